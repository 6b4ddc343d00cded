"""A data set, many methods and budgets: every sample is read and prefilled once.

for records in evaluate(model, processor, samples, configs, batch_size=8):
    ...
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin

from purekv.attach import Run
from purekv.config import PureKVConfig
from purekv.errors import PureKVError
from purekv.evals.answering import (
    Batch,
    Media,
    Read,
    Row,
    answer_samples,
    prepare_samples,
    read_media,
)
from purekv.evals.frames import FewerFrames
from purekv.evals.methods import Method, method_name
from purekv.evals.samples import Sample
from purekv.evals.shared import SharedPrefill, Stack
from purekv.fit import check_for_model

Item = TypeVar("Item")


class Sized(Protocol):
    @property
    def pixels(self) -> int: ...

    @property
    def sound(self) -> str | None: ...


Seen = TypeVar("Seen", bound=Sized)


@dataclass(frozen=True)
class Outcome:
    """One sample under one method; a list has an item for each turn."""

    answers: list[str]
    right: list[bool]
    kl: list[float]
    """Divergence KL(full || ours) of the next-token distributions, in nats: mean over the gold
    answer's tokens and the one behind them."""
    agreement: list[float]
    """Share of these places where both would say the same token."""
    kv_bytes: int
    """Of all cache tensors once the prompt has run, its last token included: the batch's, over its
    rows."""


@dataclass(frozen=True)
class Record:
    """One sample under the full cache and each config, in that order; or why it was left out."""

    id: str
    visual_tokens: int = 0
    pixels: int | None = None
    """What decides with which other samples it is batched; None if it could not be read."""
    outcomes: tuple[Outcome, ...] = ()
    skipped: str | None = None
    sound: str | None = None
    """As `Media.sound`, which decides with whom it is batched, too."""

    def to_dict(self) -> dict[str, Any]:
        if self.skipped:
            names = ("id", "pixels", "skipped", "sound")
            return {name: getattr(self, name) for name in names}
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Record":
        outcomes = tuple(Outcome(**one) for one in data.get("outcomes", ()))
        return cls(**{**data, "outcomes": outcomes})


def check_ids(samples: Sequence[Sample]) -> None:
    """Raises PureKVError if two samples share an id."""
    for name, count in Counter(sample.id for sample in samples).items():
        if count > 1:
            raise PureKVError(
                f"{count} samples have the same id {name!r}; make the ids of the data set unique"
            )


@torch.inference_mode()
def evaluate(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    samples: Sequence[Sample],
    configs: Sequence[Method],
    *,
    batch_size: int = 8,
    rows_at_once: int | None = None,
    read: Read | None = None,
    done: Mapping[str, Record] | None = None,
    decode: bool = True,
) -> Iterator[list[Record]]:
    """Ask every sample all its turns, with the full cache and with each config.

    Samples are batched with others of as many pixels and turns, with sound or without; while the
    model works on a batch, a thread reads the next one. Configs that evict after attention and let
    the first token feel it share one prefill; each other one has its own. Yields the records of a
    batch when it is done, and of a sample that cannot be read or asked as soon as that is known.

    Args:
        batch_size: samples prefilled together.
        rows_at_once: samples times configs answered together (default: 32 on a CPU, else 1024).
        read: how a sample becomes pixels (default: its files are decoded).
        done: records of an earlier call with the same samples, by id. Batches are the same as
            theirs; those that are whole are not asked again.
        decode: whether answers are decoded, or read off the gold ones (`answer_samples`): several
            times as fast, the same answers right, wrong ones cut where they differ. Where answers
            are free text, all are decoded.

    Raises:
        PureKVError: two samples share an id.
    """
    check_ids(samples)
    decode = decode or any(turn.references for sample in samples for turn in sample.turns)
    asking = Asking(model, processor, configs, rows_at_once, decode)
    read = read or (lambda sample: read_media(processor, sample))
    for group in _ahead(make_groups(samples, batch_size, read, done or {})):
        if isinstance(group, Record):
            yield [group]
        else:
            yield asking.ask(group)


@dataclass(frozen=True)
class Group(Generic[Seen]):
    """A batch, and what is known of its media: they themselves, where the model is here."""

    samples: list[Sample]
    media: list[Seen]


def make_groups(
    samples: Iterable[Sample],
    size: int,
    read: Callable[[Sample], Seen],
    done: Mapping[str, Record],
) -> Iterator[Group[Seen] | Record]:
    """Up to `size` samples of as many pixels and turns, all with sound or none: their prompts are
    about equally long, and silence need not be made up for one of them."""
    waiting: dict[Any, list[tuple[Sample, Seen | None]]] = defaultdict(list)

    def whole(kind: Any) -> Iterator[Group[Seen]]:
        group = waiting.pop(kind)
        members = [sample for sample, _ in group]
        if not all(sample.id in done for sample in members):
            yield Group(members, [media or read(sample) for sample, media in group])

    for sample in samples:
        record, media = done.get(sample.id), None
        if record is not None:
            if record.pixels is None:
                continue
            pixels, sound = record.pixels, record.sound
        else:
            try:
                media = read(sample)
            except (PureKVError, OSError, ValueError) as error:
                yield Record(sample.id, skipped=" ".join(str(error).split()))
                continue
            pixels, sound = media.pixels, media.sound
        kind = (pixels, sound, len(sample.turns))
        waiting[kind].append((sample, media))
        if len(waiting[kind]) == size:
            yield from whole(kind)
    for kind in list(waiting):
        yield from whole(kind)


def _ahead(items: Iterator[Item]) -> Iterator[Item]:
    """The same items; a thread makes the next one while the caller is busy with the last."""
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = thread.submit(next, items, None)
            yield item


class Asking:
    """A model and the configs that it is asked with."""

    def __init__(
        self,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        configs: Sequence[Method],
        rows_at_once: int | None = None,
        decode: bool = True,
    ) -> None:
        if rows_at_once is None:
            rows_at_once = 32 if model.device.type == "cpu" else 1024
        for config in configs:
            if isinstance(config, PureKVConfig):
                check_for_model(config, model)
        self.model, self.processor = model, processor
        self.configs, self.rows_at_once = list(configs), rows_at_once
        self.decode = decode
        self.shared = [number for number, config in enumerate(configs) if _shares_prefill(config)]

    def ask(self, group: Group[Media]) -> list[Record]:
        """Records of a batch; where it is refused, of its samples one by one."""
        try:
            batch = prepare_samples(self.model, self.processor, group.samples, group.media)
            return self._ask(group, batch)
        except (PureKVError, ValueError) as error:
            if len(group.samples) == 1:
                reason = " ".join(str(error).split())
                ((sample,), (media,)) = group.samples, group.media
                return [Record(sample.id, 0, media.pixels, skipped=reason, sound=media.sound)]
        pairs = zip(group.samples, group.media, strict=True)
        return [record for pair in pairs for record in self.ask(Group([pair[0]], [pair[1]]))]

    def _answer(self, batch: Batch, stack: Stack | None = None) -> list[Row]:
        return answer_samples(
            self.model, self.processor, batch, stack, force=True, decode=self.decode
        )

    def _named(self, number: int) -> str:
        if number == 0:
            return "the full cache"
        config = self.configs[number - 1]
        return f"{method_name(config)} at budget {config.budget}"

    def _ask(self, group: Group[Media], batch: Batch) -> list[Record]:
        size = len(group.samples)
        outcomes: list[dict[int, Outcome]] = [{} for _ in range(size)]  # of each sample; 0: full
        full: list[Row] = []

        def take(number: int, rows: list[Row]) -> None:
            for k, outcome in enumerate(_outcomes(group.samples, rows, full)):
                outcomes[k][number] = outcome
                if not all(map(math.isfinite, outcome.kl)):
                    raise PureKVError(
                        f"log-probabilities are not finite under {self._named(number)}; "
                        "try --dtype float32"
                    )

        configs: list[Any] = [self.configs[number] for number in self.shared]
        with SharedPrefill(configs, self.model, self.rows_at_once) as run:
            stacks = run.stacks(batch.inputs)
            visual_tokens = run.report.visual_tokens
            while stacks:
                stack = stacks.pop(0)  # its cache is freed once it has answered
                rows = self._answer(batch, stack)
                for place, member in enumerate(stack.members):
                    ours = rows[place * size : (place + 1) * size]
                    full = full or ours  # the full cache comes first
                    take(0 if member is None else 1 + self.shared[member], ours)
        for number, config in enumerate(self.configs):
            if isinstance(config, FewerFrames):
                media = [config.thin(one) for one in group.media]
                fewer = prepare_samples(self.model, self.processor, group.samples, media)
                with SharedPrefill([], self.model) as plain:
                    (stack,) = plain.stacks(fewer.inputs)
                    rows = self._answer(fewer, stack)
                take(1 + number, rows)
            elif number not in self.shared:
                with Run(config, self.model):
                    rows = self._answer(batch)
                take(1 + number, rows)
        return [
            Record(
                sample.id,
                visual_tokens[k],
                group.media[k].pixels,
                tuple(found for _, found in sorted(outcomes[k].items())),
                sound=group.media[k].sound,
            )
            for k, sample in enumerate(group.samples)
        ]


def _shares_prefill(config: Method) -> bool:
    """Whether `SharedPrefill` can serve it: its prefill is the dense one, to the last layer."""
    settings = (config.prefill, config.evict, config.first_token)
    if settings != ("dense", "post", "compressed") or not isinstance(config, PureKVConfig):
        return False
    # A tolerance makes a layer's scores depend on the budget.
    return config.tolerance is None and config.prune is None


def _outcomes(samples: Sequence[Sample], ours: Sequence[Row], full: Sequence[Row]) -> list[Outcome]:
    """Of each sample. Waits for the device once."""
    parts = [len(forced) for row in ours for forced in row.forced]
    theirs, mine = (torch.cat([f for row in rows for f in row.forced]) for rows in (full, ours))
    places = torch.stack([_divergence(theirs, mine), theirs.argmax(-1) == mine.argmax(-1)])
    means = [part.mean(1).tolist() for part in places.double().cpu().split(parts, dim=1)]
    outcomes = []
    for sample, row in zip(samples, ours, strict=True):
        turns, means = means[: len(row.forced)], means[len(row.forced) :]
        answers = zip(sample.turns, row.texts, row.ended, strict=True)
        outcomes.append(
            Outcome(
                row.texts,
                # A letter is chosen whatever is said behind it; words are not right if more follow.
                [
                    turn.accepts(text) and (ended or bool(turn.choices))
                    for turn, text, ended in answers
                ],
                # Rounding may leave a divergence a little below 0.
                [_significant(kl if math.isnan(kl) else max(kl, 0.0)) for kl, _ in turns],
                [_significant(same) for _, same in turns],
                row.kv_bytes,
            )
        )
    return outcomes


def _divergence(full: Tensor, ours: Tensor) -> Tensor:
    """KL(full || ours) at each place [n], in nats; arguments are log-probabilities [n, V].

    Tokens that the full cache gives no chance, as models do that mask some, add nothing. NaN if one
    of the arguments holds it.
    """
    impossible = full == -math.inf
    return (full.exp() * (full - ours)).masked_fill(impossible & ~ours.isnan(), 0.0).sum(-1)


def _significant(value: float) -> float:
    return float(f"{value:.6g}")
