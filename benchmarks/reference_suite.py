"""Accuracy kept by each method at each budget, on a data set in the project's format.

    python benchmarks/reference_suite.py --level smoke      # 50 samples, minutes on two cores
    python benchmarks/reference_suite.py --level full       # 2,000 samples, minutes on one GPU
    python benchmarks/reference_suite.py --level dense --tokens 4k     # the full cache alone

Without --data, the reference model's own questions are asked: as files, or with --draw as pixels
that never were files, which needs no codec. Every sample is read and prefilled
once; all methods and budgets are scored from that prefill and answer from their compressed caches,
the first token included; later turns are asked after the gold answers to the earlier ones.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import RESULTS, settings, write_results
from PIL import Image

from purekv import PureKVConfig
from purekv.evals import Evaluation, Media, Sample, Turn, evaluate, read_samples, summarise
from purekv.loading import Checkpoint
from purekv.media import Clip
from purekv.reference import default_checkpoint, write_dataset
from purekv.reference.data import SUITES, suite
from purekv.reference.render import ASSETS, Renderer, load_clip, pack
from purekv.reference.scene import LEVEL as DIFFICULTY
from purekv.reference.scene import LEVELS as DIFFICULTIES

METHODS = ["clie", "snapkv", "h2o", "streaming", "value_norm", "key_diff", "vatp", "random"]
# What a level asks, unless the command line says otherwise.
LEVELS: dict[str, dict[str, Any]] = {
    "smoke": {
        "methods": ["clie", "snapkv", "h2o", "random"],
        "budgets": [0.2, 0.1],
        "limit": 50,
        "batch": 8,
        "tokens": "576",
    },
    "full": {
        "methods": METHODS,
        "budgets": [0.5, 0.3, 0.2, 0.1, 0.05, 0.02],
        "limit": 2000,
        "batch": 64,
        "tokens": "1k",
    },
    "dense": {"methods": [], "budgets": [], "limit": 2000, "batch": 16, "tokens": "1k"},
}


def main() -> None:
    arguments = parse()
    started = time.perf_counter()
    checkpoint = Checkpoint.find(arguments.model or default_checkpoint())
    processor = checkpoint.processor()
    model = checkpoint.model(device=arguments.device, dtype=arguments.dtype)
    configs = [
        PureKVConfig(budget=budget, scorer=method, first_token="compressed")
        for method, budget in product(arguments.methods, arguments.budgets)
    ]
    with tempfile.TemporaryDirectory() as folder:
        read = None
        if arguments.data:
            samples = read_samples(arguments.data, arguments.limit)
        elif arguments.draw:
            samples, read = drawn(arguments, model.device)
        else:  # the reference model's questions about media that it has not seen, as files
            samples = read_samples(
                write_dataset(
                    folder, arguments.limit, arguments.seed,
                    tokens=arguments.tokens, level=arguments.difficulty,
                )
            )  # fmt: skip
        prepared = time.perf_counter() - started
        result = evaluate(
            model, processor, samples, configs,
            batch_size=arguments.batch,
            read=read,
            progress=lambda so_far: show_progress(so_far, len(samples)),
            seconds=None if arguments.minutes is None else 60 * arguments.minutes,
        )  # fmt: skip
    tokens = result.visual_tokens.values()
    rows = []
    for config, ours in zip([None, *configs], [result.full, *result.ours], strict=True):
        row = {"what": "quality", "tokens": round(sum(tokens) / len(tokens))}
        row |= summarise(samples, ours, result.full, config)
        rows.append(row)
        print(describe(row))
    if arguments.data:
        arguments.data = arguments.data.name
    run = {
        "dtype": str(model.dtype),
        "samples": len(result.full),
        "seconds": {"preparing": round(prepared, 1), "evaluating": round(result.seconds, 1)},
    }
    write_results(arguments.out, settings(arguments) | run, rows)
    print(f"{len(result.full)} samples; {prepared:.0f} s preparing, {result.seconds:.0f} s asking")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--level", choices=LEVELS, default="smoke", help="sets what is left out")
    parser.add_argument("--model", help="checkpoint directory (default: the embedded model)")
    parser.add_argument("--methods", nargs="+")
    parser.add_argument("--budgets", nargs="+", type=budget)
    parser.add_argument("--tokens", choices=SUITES, help="visual tokens of a prompt, about")
    parser.add_argument("--difficulty", choices=DIFFICULTIES, default=DIFFICULTY)
    parser.add_argument("--draw", action="store_true", help="ask about pixels, not files")
    parser.add_argument("--data", type=Path, help="a data set's .jsonl")
    parser.add_argument("--limit", type=int, help="samples")
    parser.add_argument("--batch", type=int, help="samples prefilled together")
    parser.add_argument("--seed", type=int, default=20_000, help="of the data; never trained on")
    parser.add_argument("--minutes", type=float, help="stop there with the samples done so far")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    for name, value in LEVELS[arguments.level].items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    if arguments.out is None:
        arguments.out = RESULTS / f"reference_{arguments.level}.json"
    return arguments


def drawn(
    arguments: argparse.Namespace, device: torch.device
) -> tuple[list[Sample], Callable[[Sample], Media]]:
    """Samples without files, and what draws their pixels."""
    known = {}
    samples = []
    found = suite(arguments.tokens, arguments.limit, arguments.seed, arguments.difficulty)
    for number, one in enumerate(found):
        name = f"{arguments.seed}-{number:05d}"
        paths = tuple(Path(f"{name}-{k}") for k in range(len(one.scenes)))
        turns = tuple(Turn(t.question, t.reply, t.category, t.choices) for t in one.turns)
        is_video = one.scenes[0].frames > 1
        samples.append(Sample(name, paths if is_video else (), () if is_video else paths, turns))
        known[name] = one.scenes
    renderer = Renderer(device, load)

    def read(sample: Sample) -> Media:
        pixels = renderer(pack(known[sample.id])).permute(0, 1, 3, 4, 2).cpu().numpy()
        if sample.videos:
            return Media(videos=tuple(Clip(frames, 2.0) for frames in pixels))
        return Media(images=tuple(Image.fromarray(frames[0]) for frames in pixels))

    return samples, read


def load(name: str) -> np.ndarray:
    """A shipped clip; through OpenCV where PyAV is absent, with colours that differ a little."""
    try:
        return load_clip(name)
    except ImportError:
        import cv2

        clip, frames = cv2.VideoCapture(str(ASSETS / name)), []
        while (got := clip.read())[0]:
            frames.append(got[1][:, :, ::-1])
        return np.stack(frames)


def budget(text: str) -> float | int:
    """A share has a point, a count has none."""
    return float(text) if "." in text else int(text)


def show_progress(found: Evaluation, total: int) -> None:
    done = len(found.full)
    left = found.seconds / done * (total - done)
    accuracies = [
        sum(map(sum, rights.values())) / sum(map(len, rights.values()))
        for rights in [found.full, *found.ours]
    ]
    print(
        f"{done}/{total}, {left:.0f} s left, accuracy",
        *(f"{accuracy:.2f}" for accuracy in accuracies),
        file=sys.stderr,
        flush=True,
    )


def describe(row: dict[str, Any]) -> str:
    low, high = row["retention_ci95"]
    parts = row["by_category"].items()
    worst, part = min(parts, key=lambda item: item[1]["accuracy"])
    turns = " ".join(f"{part['retention']:.3f}" for part in row["by_turn"].values())
    return (
        f"{row['scorer']:>10} {row['budget']:<5}: accuracy {row['accuracy']:.3f} (n={row['n']}), "
        f"retention {row['retention']:.3f} [{low:.3f}, {high:.3f}], by turn {turns}, "
        f"worst {worst} {part['accuracy']:.3f}"
    )


if __name__ == "__main__":
    main()
