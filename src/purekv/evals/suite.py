"""A data set, many methods and budgets: every sample is read and prefilled once.

correct = evaluate(model, processor, samples, configs, batch_size=8)
for config, ours in zip([None, *configs], correct):
    print(summarise(samples, ours, correct[0], config))
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel, ProcessorMixin

from purekv.config import PureKVConfig
from purekv.errors import PureKVError
from purekv.evals.answering import (
    Batch,
    Media,
    Read,
    answer_samples,
    prepare_samples,
    read_media,
)
from purekv.evals.metrics import accuracy_interval, retention_interval
from purekv.evals.samples import Sample
from purekv.evals.shared import SharedPrefill

Rights = dict[str, list[bool]]
"""By sample id: whether the answer to each turn was right."""

Item = TypeVar("Item")


@dataclass
class Evaluation:
    """What an evaluation found; it grows with every batch."""

    full: Rights
    """With the full cache."""
    ours: list[Rights]
    """With each config."""
    visual_tokens: dict[str, int] = field(default_factory=dict)
    """By sample id: of its prompt."""
    seconds: float = 0.0
    """Reading, prefilling and answering, so far."""


@torch.inference_mode()
def evaluate(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    samples: Sequence[Sample],
    configs: Sequence[PureKVConfig],
    *,
    batch_size: int = 8,
    rows_at_once: int | None = None,
    read: Read | None = None,
    progress: Callable[[Evaluation], None] | None = None,
    seconds: float | None = None,
) -> Evaluation:
    """Ask every sample all its turns, with the full cache and with each config.

    Samples are batched with others of as many pixels and turns; while the model works on a batch, a
    thread reads the next one. The answer's first token already comes out of the
    compressed cache.

    Args:
        batch_size: samples prefilled together.
        rows_at_once: samples times configs answered together (default: 32 on a CPU, 512 elsewhere).
        read: how a sample becomes pixels (default: its files are decoded).
        progress: called after every batch with what was found so far.
        seconds: stop with the samples done by then.

    Raises:
        PureKVError: two samples share an id.
    """
    if len({sample.id for sample in samples}) < len(samples):
        raise PureKVError("two samples have the same id; make the ids of the data set unique")
    if rows_at_once is None:
        rows_at_once = 32 if model.device.type == "cpu" else 512

    def prepared() -> Iterator[tuple[list[Sample], Batch]]:
        for group in _batches(samples, batch_size, read or (lambda s: read_media(processor, s))):
            members = [sample for sample, _ in group]
            yield members, prepare_samples(model, processor, members, [media for _, media in group])

    found = Evaluation({}, [{} for _ in configs])
    started = time.perf_counter()
    with SharedPrefill(configs, model, rows_at_once) as run:
        for members, batch in _ahead(prepared()):
            stacks = run.stacks(batch.inputs)
            ids = [sample.id for sample in members]
            found.visual_tokens |= zip(ids, run.report.visual_tokens, strict=True)
            while stacks:
                stack = stacks.pop(0)  # its cache is freed once it has answered
                answers = iter(answer_samples(model, processor, batch, stack))
                for number in stack.members:
                    rights = found.full if number is None else found.ours[number]
                    for sample, texts in zip(members, answers, strict=False):
                        pairs = zip(sample.turns, texts, strict=True)
                        rights[sample.id] = [turn.accepts(text) for turn, text in pairs]
            found.seconds = time.perf_counter() - started
            if progress is not None:
                progress(found)
            if seconds is not None and found.seconds > seconds:
                break
    return found


def _batches(
    samples: Iterable[Sample], size: int, read: Read
) -> Iterator[list[tuple[Sample, Media]]]:
    """Up to `size` samples of as many pixels and turns: their prompts are about equally long."""
    waiting: dict[Any, list[tuple[Sample, Media]]] = defaultdict(list)
    for sample in samples:
        media = read(sample)
        kind = (media.pixels, len(sample.turns))
        waiting[kind].append((sample, media))
        if len(waiting[kind]) == size:
            yield waiting.pop(kind)
    yield from waiting.values()


def _ahead(items: Iterator[Item]) -> Iterator[Item]:
    """The same items; a thread makes the next one while the caller is busy with the last."""
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = thread.submit(next, items, None)
            yield item


def summarise(
    samples: Sequence[Sample], ours: Rights, full: Rights, config: PureKVConfig | None
) -> dict[str, Any]:
    """One row of a table, over the samples that `ours` has; plain JSON types.

    Accuracy with a Wilson interval for clusters of media, retention (accuracy over the full
    cache's) with a bootstrap over media, both also by category, by turn ("1" is the first) and by
    kind of media.

    Args:
        config: None for the full cache.
    """
    answers: list[_Answer] = []
    for sample in samples:
        if sample.id in ours:
            rights = zip(sample.turns, ours[sample.id], full[sample.id], strict=True)
            for number, (turn, right, dense) in enumerate(rights, 1):
                keys = {"category": turn.category, "turn": str(number), "media": sample.media}
                answers.append((keys, sample.cluster, right, dense))
    row = {
        "scorer": config.scorer if config else "full",
        "budget": config.budget if config else 1.0,
        "source_layers": config.source_layers if config else None,
        **_part(answers),
    }
    for key in ("category", "turn", "media"):
        parts: dict[str, list[_Answer]] = defaultdict(list)
        for answer in answers:
            parts[answer[0][key]].append(answer)
        row[f"by_{key}"] = {name: _part(part) for name, part in sorted(parts.items())}
    return row


_Answer = tuple[dict[str, str], str, bool, bool]


def _part(answers: Sequence[_Answer]) -> dict[str, Any]:
    _, clusters, ours, full = zip(*answers, strict=True)
    kept, low, high = retention_interval(ours, full, clusters)
    return {
        "n": len(ours),
        "accuracy": sum(ours) / len(ours),
        "ci95": list(accuracy_interval(ours, clusters)),
        "retention": kept,
        "retention_ci95": [low, high],
    }
