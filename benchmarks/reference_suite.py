"""Accuracy kept by each method at each budget, on a data set in the project's format.

    python benchmarks/reference_suite.py --level smoke      # 50 samples, minutes on two cores
    python benchmarks/reference_suite.py --level full       # 2,000 samples, minutes on one GPU
    python benchmarks/reference_suite.py --level dense --tokens 4k     # the full cache alone
    python benchmarks/reference_suite.py --level modes      # sparse prefill, dropping, fewer frames

Without --data, the reference model's own questions are asked: as files, or with --draw as pixels
that never were files, which needs no codec. Every sample is read and prefilled
once; all methods and budgets are scored from that prefill and answer from their compressed caches,
the first token included; later turns are asked after the gold answers to the earlier ones.
"""

import argparse
import multiprocessing
import random
import signal
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from queue import Empty
from typing import Any

import numpy as np
import torch
from common import RESULTS, settings, write_results
from PIL import Image

from purekv import SpatioTemporalConfig
from purekv.evals import (
    Media,
    Record,
    Sample,
    Turn,
    evaluate,
    make_methods,
    read_samples,
    summarise,
)
from purekv.evals.methods import Method
from purekv.loading import Checkpoint, fingerprint
from purekv.media import Clip
from purekv.planning import Plan
from purekv.planning.calibrate import for_long_prompts
from purekv.reference import default_checkpoint, write_dataset
from purekv.reference.data import SUITES, Drawn, suite
from purekv.reference.render import ASSETS, Renderer, load_clip, pack
from purekv.reference.scene import LEVEL as DIFFICULTY
from purekv.reference.scene import LEVELS as DIFFICULTIES

METHODS = [
    "clie", "clie_rare", "snapkv", "pyramidkv", "adakv", "expected_attention", "h2o", "vatp",
    "key_diff", "infinipot_v", "value_norm", "streaming", "random", "fastv", "evs", "frames",
]  # fmt: skip
# What a level asks, unless the command line says otherwise.
LEVELS: dict[str, dict[str, Any]] = {
    "smoke": {
        "methods": ["clie", "snapkv", "random"],
        "budgets": [0.2],
        "limit": 50,
        "batch": 8,
        "tokens": "576",
    },
    "full": {
        "methods": METHODS,
        "budgets": [0.5, 0.2, 0.1, 0.05, 0.02],
        "limit": 2000,
        "batch": 64,
        "tokens": "1k",
    },
    "dense": {"methods": [], "budgets": [], "limit": 2000, "batch": 16, "tokens": "1k"},
    "modes": {"methods": [], "budgets": [], "limit": 2000, "batch": 64, "tokens": "1k"},
}
WRITE_EVERY = 60.0  # seconds
# Ways to save time too: what `sparse_prefill.py` times, and what users would try first.
SPARSE = {"prefill": "spatiotemporal", "spatiotemporal": SpatioTemporalConfig(min_tokens=0)}
EARLY: dict[str, Any] = {"source_layers": (2,)}
MODES: list[tuple[str, float, dict[str, Any]]] = [
    ("clie", 1.0, SPARSE),
    ("clie", 0.2, SPARSE),
    ("clie", 0.2, {"evict": "active", **EARLY}),
    ("clie", 0.2, {"evict": "drop", **EARLY}),
    ("clie", 0.1, {"evict": "drop", **EARLY}),
    ("clie", 0.2, {"evict": "drop", **EARLY, **SPARSE}),
    ("clie", 0.1, {"evict": "drop", **EARLY, **SPARSE}),
    ("clie", 0.35, {"evict": "drop", "source_layers": (5,), **SPARSE}),
    ("clie", 0.2, {"evict": "drop", "source_layers": (14,)}),
    ("fastv", 0.2, {}),
    ("evs", 0.35, {}),
    ("evs", 0.2, {}),
    ("frames", 0.2, {}),
]


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exit that ends the workers too
    arguments = parse()
    given, started = arguments.data, time.perf_counter()
    arguments.model = str(arguments.model or default_checkpoint())
    configs = find_methods(arguments)
    model = Checkpoint.find(arguments.model).model(device=arguments.device, dtype=arguments.dtype)
    run: dict[str, Any] = {"dtype": str(model.dtype), "model": fingerprint(model)}
    del model
    with tempfile.TemporaryDirectory() as folder:
        if not arguments.data and not arguments.draw:
            # the reference model's questions about media that it has not seen, as files
            arguments.data = write_dataset(
                folder, arguments.limit, arguments.seed,
                tokens=arguments.tokens, level=arguments.difficulty,
            )  # fmt: skip
        batches, _ = find_batches(arguments, torch.device("cpu"))
        samples = list(chain.from_iterable(batches))
        shown = settings(arguments) | {"data": given.name if given else "None"}
        asked = time.perf_counter()
        prepared = round(asked - started, 1)
        records: dict[str, Record] = {}

        def write() -> list[dict[str, Any]]:
            """What was asked so far: a machine may be taken away."""
            rows = summarise(samples, records, configs)
            evaluating = round(time.perf_counter() - asked, 1)
            seconds = {"preparing": prepared, "evaluating": evaluating}
            run.update(samples=rows[0]["samples"], seconds=seconds)
            write_results(arguments.out, shown | run, rows)
            return rows

        written, rows = asked, []
        try:
            for batch in ask_all(arguments):
                records |= {record.id: record for record in batch}
                show_progress(records, len(samples), time.perf_counter() - asked)
                if time.perf_counter() - written > WRITE_EVERY:
                    write()
                    written = time.perf_counter()
        finally:
            if records:  # of a run that was stopped as well
                rows = write()
    for row in rows:
        print(describe(row))
    for record in records.values():
        if record.skipped:
            print(f"skipped {record.id}: {record.skipped}", file=sys.stderr)
    print(f"{len(records)} samples; {run['seconds']}")


def ask_all(arguments: argparse.Namespace) -> Iterator[list[Record]]:
    """Records of all samples, from one process or several."""
    if arguments.workers == 1:
        yield from ask(arguments, 0)
        return
    context = multiprocessing.get_context("spawn")
    queue: Any = context.Queue()
    workers = [
        context.Process(target=work, args=(arguments, part, queue))
        for part in range(arguments.workers)
    ]
    for worker in workers:
        worker.start()
    running = len(workers)
    try:
        while running:
            try:
                batch = queue.get(timeout=5)
            except Empty:
                if all(worker.is_alive() or worker.exitcode == 0 for worker in workers):
                    continue
                raise SystemExit("a worker failed; its error is above") from None
            if batch is None:
                running -= 1
            else:
                yield [Record.from_dict(record) for record in batch]
    finally:
        for worker in workers:
            worker.terminate()


def work(arguments: argparse.Namespace, part: int, queue: Any) -> None:
    for batch in ask(arguments, part):
        queue.put([asdict(record) for record in batch])
    queue.put(None)


def ask(arguments: argparse.Namespace, part: int) -> Iterator[list[Record]]:
    """Records of every so many-th batch, as many as there are workers."""
    checkpoint = Checkpoint.find(arguments.model)
    device = arguments.device
    if device in ("auto", "cuda") and torch.cuda.is_available():
        device = f"cuda:{part % torch.cuda.device_count()}"
    model = checkpoint.model(device=device, dtype=arguments.dtype)
    batches, read = find_batches(arguments, model.device)
    configs = find_methods(arguments)
    asked = time.perf_counter()
    mine = list(chain.from_iterable(batches[part :: arguments.workers]))
    for batch in evaluate(
        model, checkpoint.processor(), mine, configs,
        batch_size=arguments.batch, read=read, decode=not arguments.forced,
    ):  # fmt: skip
        yield batch
        if arguments.minutes is not None and time.perf_counter() - asked > 60 * arguments.minutes:
            break


def find_methods(arguments: argparse.Namespace) -> list[Method]:
    """Every method at every budget, and what plans say: at every budget, or for speed, as it is."""
    configs = make_methods(arguments.methods, arguments.budgets, first_token="compressed")
    for name in arguments.plan:
        plan = Plan.read(name)
        if plan.target.startswith("prefill"):
            configs.append(for_long_prompts(plan.settings))
        else:
            planned = {"first_token": "compressed", "plan": name, "prune": arguments.prune}
            configs += make_methods(["clie"], arguments.budgets, **planned)
    if arguments.level == "modes":
        for name, budget, mode in MODES:
            configs += make_methods([name], [budget], first_token="compressed", **mode)
    return configs


def find_batches(
    arguments: argparse.Namespace, device: torch.device
) -> tuple[list[list[Sample]], Callable[[Sample], Media] | None]:
    """Batches of samples, and what draws their pixels where these are no files."""
    if arguments.data:
        # What they show is known once they are read: `evaluate` batches them.
        return [[sample] for sample in read_samples(arguments.data, arguments.limit)], None
    found = list(suite(arguments.tokens, arguments.limit, arguments.seed, arguments.difficulty))
    samples, read = drawn(found, arguments.seed, device)
    pairs = [
        ((one.geometry, len(one.turns)), sample) for one, sample in zip(found, samples, strict=True)
    ]
    # They come geometry by geometry: with --minutes, the last ones would not be asked at all.
    random.Random(arguments.seed).shuffle(pairs)
    return alike(pairs, arguments.batch), read


def alike(pairs: Iterable[tuple[Any, Sample]], size: int) -> list[list[Sample]]:
    """Batches of samples of one kind, whole ones first."""
    whole, filling = [], defaultdict(list)
    for kind, sample in pairs:
        filling[kind].append(sample)
        if len(filling[kind]) == size:
            whole.append(filling.pop(kind))
    return [*whole, *filling.values()]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--level", choices=LEVELS, default="smoke", help="sets what is left out")
    parser.add_argument("--model", help="checkpoint directory (default: the embedded model)")
    parser.add_argument("--methods", nargs="+")
    parser.add_argument("--budgets", nargs="+", type=budget)
    parser.add_argument(
        "--plan", nargs="+", default=[], help="plans' files or names, asked as well"
    )
    parser.add_argument("--prune", type=float, help="share of the tokens that go in under plans")
    parser.add_argument("--tokens", choices=SUITES, help="visual tokens of a prompt, about")
    parser.add_argument("--difficulty", choices=DIFFICULTIES, default=DIFFICULTY)
    parser.add_argument("--draw", action="store_true", help="ask about pixels, not files")
    parser.add_argument("--data", type=Path, help="a data set's .jsonl")
    parser.add_argument("--limit", type=int, help="samples")
    parser.add_argument("--batch", type=int, help="samples prefilled together")
    parser.add_argument(
        "--workers",
        type=int,
        default=1,
        help="processes, dealt out to the GPUs; a small model leaves one idle",
    )
    parser.add_argument(
        "--forced", action="store_true", help="read answers off the gold ones: no decoding"
    )
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
    found: Iterable[Drawn], seed: int, device: torch.device
) -> tuple[list[Sample], Callable[[Sample], Media]]:
    """Samples without files, and what draws their pixels."""
    known = {}
    samples = []
    for number, one in enumerate(found):
        name = f"{seed}-{number:05d}"
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


def show_progress(records: dict[str, Record], total: int, spent: float) -> None:
    done = len(records)
    columns = zip(*(record.outcomes for record in records.values() if record.outcomes), strict=True)
    rights = [[right for outcome in column for right in outcome.right] for column in columns]
    print(
        f"{done}/{total}, {spent / done * (total - done):.0f} s left, accuracy",
        *(f"{sum(right) / len(right):.2f}" for right in rights),
        file=sys.stderr,
        flush=True,
    )


def describe(row: dict[str, Any]) -> str:
    parts = row["by_category"].items()
    worst, part = min(parts, key=lambda item: item[1]["accuracy"])
    turns = " ".join(f"{share(part['retention'])}" for part in row["by_turn"].values())
    interval = ", ".join(map(share, row["retention_ci95"] or [None, None]))
    return (
        f"{row['method']:>10}{' planned' if row['plan'] else ''} {row['budget']:<5}: "
        f"accuracy {row['accuracy']:.3f} (n={row['n']}), "
        f"retention {share(row['retention'])} [{interval}], by turn {turns}, "
        f"KL {row['kl']:.3g}, worst {worst} {part['accuracy']:.3f}"
    )


def share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


if __name__ == "__main__":
    main()
