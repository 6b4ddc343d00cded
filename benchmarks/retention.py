"""Accuracy kept at each budget, on the reference model's own questions.

    python benchmarks/retention.py --n 800 --out benchmarks/results/retention.json

Videos are written as mp4 files and read back through the model's processor. Each sample
is prefilled once and answered with every method and budget from the compressed cache, the first
token included (`first_token="compressed"`); a second turn is asked after the gold first answer.
"""

import argparse
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import torch
from common import RESULTS, settings, write_results
from transformers import PreTrainedModel, ProcessorMixin

from purekv import PureKVConfig
from purekv.evals import (
    Sample,
    SharedPrefill,
    answer_samples,
    exact_match,
    prepare_samples,
    read_samples,
    retention_interval,
    wilson_interval,
)
from purekv.loading import Checkpoint
from purekv.reference import default_checkpoint, write_dataset

METHODS = ("clie", "snapkv", "value_norm", "random")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="checkpoint directory (default: the embedded model)")
    parser.add_argument("--n", type=int, default=800)
    parser.add_argument("--seed", type=int, default=20_000, help="of the data; never trained on")
    parser.add_argument("--frames", type=int, nargs="+", default=[20])
    parser.add_argument("--size", type=int, nargs="+", default=[280])
    parser.add_argument(
        "--runs",
        nargs="+",
        default=[f"{name}:{budget}" for name in METHODS for budget in (0.2, 0.1, 0.05)],
        help="scorer:budget of each run",
    )
    parser.add_argument("--minutes", type=float, help="stop there with the samples done so far")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--out", type=Path, default=RESULTS / "retention.json")
    arguments = parser.parse_args()

    checkpoint = Checkpoint.find(arguments.model or default_checkpoint())
    processor = checkpoint.processor()
    model = checkpoint.model(dtype=arguments.dtype)
    configs = [
        PureKVConfig(budget=float(budget), scorer=scorer, first_token="compressed")
        for scorer, budget in (run.split(":") for run in arguments.runs)
    ]
    rows = []
    for frames, size in zip(arguments.frames, arguments.size, strict=True):
        with tempfile.TemporaryDirectory() as folder:
            samples = make_samples(Path(folder), arguments, frames, size)
            correct = evaluate(model, processor, samples, configs, arguments.minutes)
            samples = [sample for sample in samples if sample.id in correct[0]]
        for config, ours in zip([None, *configs], correct, strict=True):
            row = summarise(samples, ours, correct[0], config)
            row |= {"what": "quality", "frames": frames, "size": size}
            row["tokens"] = (frames // 2) * (size // 28) ** 2
            rows.append(row)
            print(describe(row), flush=True)
        write_results(arguments.out, settings(arguments) | {"dtype": str(model.dtype)}, rows)


def make_samples(
    folder: Path, arguments: argparse.Namespace, frames: int, size: int
) -> list[Sample]:
    return read_samples(write_dataset(folder, arguments.n, arguments.seed, frames, size))


@torch.inference_mode()
def evaluate(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    samples: list[Sample],
    configs: list[PureKVConfig],
    minutes: float | None,
) -> list[dict[str, list[bool]]]:
    """Whether each turn of each sample was right: with the full cache, then with each config."""
    correct: list[dict[str, list[bool]]] = [{} for _ in range(1 + len(configs))]
    started = time.perf_counter()
    for done, sample in enumerate(samples, 1):
        batch = prepare_samples(model, processor, [sample])
        with SharedPrefill(configs, model) as run:
            answers = answer_samples(model, processor, batch)
            for cache in run.caches:
                answers += answer_samples(model, processor, batch, cache=cache)
        for rights, texts in zip(correct, answers, strict=True):
            rights[sample.id] = [
                exact_match(text, turn.answer)
                for text, turn in zip(texts, sample.turns, strict=True)
            ]
        if minutes is not None and time.perf_counter() - started > 60 * minutes:
            break
        if done % 16 == 0:
            left = (time.perf_counter() - started) / done * (len(samples) - done)
            so_far = [sum(map(sum, r.values())) / sum(map(len, r.values())) for r in correct]
            print(
                f"{done}/{len(samples)}, {left:.0f} s left,",
                *(f"{accuracy:.3f}" for accuracy in so_far),
                file=sys.stderr,
                flush=True,
            )
    return correct


def summarise(
    samples: list[Sample],
    correct: dict[str, list[bool]],
    full: dict[str, list[bool]],
    config: PureKVConfig | None,
) -> dict[str, object]:
    """One row: accuracy and retention over all turns, first and later turns apart."""
    categories: dict[str, list[bool]] = defaultdict(list)
    for sample in samples:
        for turn, right in zip(sample.turns, correct[sample.id], strict=True):
            categories[turn.category].append(right)

    def part(keep: slice) -> dict[str, object]:
        ours = [right for sample in samples for right in correct[sample.id][keep]]
        theirs = [right for sample in samples for right in full[sample.id][keep]]
        names = [sample.cluster for sample in samples for _ in correct[sample.id][keep]]
        kept, low, high = retention_interval(ours, theirs, names)
        return {
            "n": len(ours),
            "accuracy": sum(ours) / len(ours),
            "ci95": wilson_interval(sum(ours), len(ours)),
            "retention": kept,
            "retention_ci95": (low, high),
        }

    return {
        "scorer": config.scorer if config else "full",
        "budget": config.budget if config else 1.0,
        "source_layers": config.source_layers if config else None,
        **part(slice(None)),
        "first_turn": part(slice(0, 1)),
        "second_turn": part(slice(1, None)),
        "by_category": {
            name: {"n": len(rights), "accuracy": sum(rights) / len(rights)}
            for name, rights in sorted(categories.items())
        },
    }


def describe(row: dict) -> str:  # type: ignore[type-arg]
    low, high = row["retention_ci95"]
    worst = min(row["by_category"].items(), key=lambda item: item[1]["accuracy"])
    return (
        f"{row['tokens']:>5} tokens {row['scorer']:>10} {row['budget']:.2f}: "
        f"accuracy {row['accuracy']:.3f} (n={row['n']}), retention {row['retention']:.3f} "
        f"[{low:.3f}, {high:.3f}], second turn {row['second_turn']['retention']:.3f}, "
        f"worst {worst[0]} {worst[1]['accuracy']:.3f}"
    )


if __name__ == "__main__":
    main()
