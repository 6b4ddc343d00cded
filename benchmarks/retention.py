"""Accuracy kept at each budget, on the reference model's own questions.

    python benchmarks/retention.py --n 800 --out benchmarks/results/retention.json

Videos are written as mp4 files and read back through the model's processor. Answers come from the
compressed cache, the first token included (`first_token="compressed"`).
"""

import argparse
import dataclasses
import multiprocessing
import tempfile
import time
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from common import RESULTS, write_results
from transformers import PreTrainedModel, ProcessorMixin

from purekv import PureKV, PureKVConfig
from purekv.evals import (
    Batch,
    Sample,
    answer_samples,
    exact_match,
    prepare_samples,
    read_samples,
    retention_interval,
    wilson_interval,
)
from purekv.loading import Checkpoint
from purekv.reference import default_checkpoint, write_dataset


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="checkpoint directory (default: the embedded model)")
    parser.add_argument("--n", type=int, default=800)
    parser.add_argument("--seed", type=int, default=20_000, help="of the data; never trained on")
    parser.add_argument("--frames", type=int, nargs="+", default=[20])
    parser.add_argument("--size", type=int, nargs="+", default=[280])
    parser.add_argument("--methods", nargs="+", default=["clie", "snapkv", "value_norm", "random"])
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.2, 0.1, 0.05])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--shards", type=int, default=1, help="processes that write the videos")
    parser.add_argument("--out", type=Path, default=RESULTS / "retention.json")
    arguments = parser.parse_args()

    checkpoint = Checkpoint.find(arguments.model or default_checkpoint())
    processor, model = checkpoint.processor(), checkpoint.model()
    configs: list[PureKVConfig | None] = [None]
    configs += [
        PureKVConfig(budget=budget, scorer=method, first_token="compressed")
        for method in arguments.methods
        for budget in arguments.budgets
    ]
    rows = []
    for frames, size in zip(arguments.frames, arguments.size, strict=True):
        with tempfile.TemporaryDirectory() as folder:
            started = time.perf_counter()
            samples = make_samples(Path(folder), arguments, frames, size)
            print(f"wrote {len(samples)} samples in {time.perf_counter() - started:.0f} s")
            batches = [
                (group, prepare_samples(model, processor, group))
                for group in make_batches(samples, arguments.batch)
            ]
            print(f"prepared after {time.perf_counter() - started:.0f} s", flush=True)
            full: dict[str, list[bool]] = {}
            for config in configs:
                started = time.perf_counter()
                correct, ratio = evaluate(model, processor, batches, config)
                full = full or correct
                row = summarise(samples, correct, full, config)
                row |= {"what": "quality", "frames": frames, "size": size, "compression": ratio}
                row["tokens"] = (frames // 2) * (size // 28) ** 2
                rows.append(row)
                seconds = time.perf_counter() - started
                print(describe(row), f"{seconds:.0f} s", flush=True)
                write_results(arguments.out, {k: str(v) for k, v in vars(arguments).items()}, rows)


def make_samples(
    folder: Path, arguments: argparse.Namespace, frames: int, size: int
) -> list[Sample]:
    """`n` samples from as many seeds as there are shards, each written by its own process."""
    seeds = [arguments.seed + shard for shard in range(arguments.shards)]
    count = -(-arguments.n // arguments.shards)
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        jobs = [
            pool.submit(write_dataset, folder / str(seed), count, seed, frames, size)
            for seed in seeds
        ]
        for job in jobs:
            job.result()
    return [
        dataclasses.replace(sample, id=f"{seed}-{sample.id}")
        for seed in seeds
        for sample in read_samples(folder / str(seed) / "data.jsonl")
    ]


def make_batches(samples: list[Sample], size: int) -> list[list[Sample]]:
    by_turns: dict[int, list[Sample]] = defaultdict(list)
    for sample in samples:
        by_turns[len(sample.turns)].append(sample)
    return [
        group[start : start + size]
        for group in by_turns.values()
        for start in range(0, len(group), size)
    ]


@torch.inference_mode()
def evaluate(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    batches: list[tuple[list[Sample], Batch]],
    config: PureKVConfig | None,
) -> tuple[dict[str, list[bool]], float]:
    """Whether each turn of each sample was right, and the mean compression."""
    correct: dict[str, list[bool]] = {}
    ratios = []
    for samples, batch in batches:
        if config is None:
            answers = answer_samples(model, processor, batch)
        else:
            with PureKV(config)(model) as run:
                answers = answer_samples(model, processor, batch)
            ratios.append(run.report.compression)
        for sample, texts in zip(samples, answers, strict=True):
            correct[sample.id] = [
                exact_match(text, turn.answer)
                for text, turn in zip(texts, sample.turns, strict=True)
            ]
    return correct, sum(ratios) / len(ratios) if ratios else 1.0


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
