"""An evaluation spread over processes. Batches are made here, from the sizes of all media, so that
they are those of one process, and so are the records."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from purekv.actors import Lost, Pool
from purekv.errors import PureKVError
from purekv.evals.answering import read_media
from purekv.evals.methods import Method
from purekv.evals.samples import Sample
from purekv.evals.suite import Asking, Group, Record, check_ids, make_groups
from purekv.loading import Checkpoint


@dataclass(frozen=True)
class Size:
    """How large a sample's media are once decoded; or why nobody knows."""

    pixels: int = 0
    sound: str | None = None
    """As `Media.sound`."""
    unreadable: str | None = None


@dataclass(frozen=True)
class SizeJob:
    """Decodes media to measure them; loads no model."""

    checkpoint: str

    def __call__(self) -> Callable[[Sample], Size]:
        processor = Checkpoint.find(self.checkpoint).processor()

        def measure(sample: Sample) -> Size:
            try:
                media = read_media(processor, sample)
                return Size(media.pixels, media.sound)
            except (PureKVError, OSError, ValueError) as error:
                return Size(unreadable=str(error))

        return measure


@dataclass(frozen=True)
class AskJob:
    """Asks batches, whose media it reads itself."""

    checkpoint: str
    device: str
    dtype: str
    configs: Sequence[Method]

    def __call__(self) -> Callable[[Sequence[Sample]], list[Record]]:
        checkpoint = Checkpoint.find(self.checkpoint)
        processor = checkpoint.processor()
        model = checkpoint.model(device=self.device, dtype=self.dtype)
        asking = Asking(model, processor, self.configs)

        @torch.inference_mode()
        def ask(samples: Sequence[Sample]) -> list[Record]:
            media = [read_media(processor, sample) for sample in samples]
            return asking.ask(Group(list(samples), media))

        return ask


def evaluate_on(
    pool: Pool,
    job: AskJob,
    samples: Sequence[Sample],
    *,
    batch_size: int = 8,
    done: Mapping[str, Record] | None = None,
) -> Iterator[list[Record]]:
    """As `evaluate`, by the pool's processes: the same records, where they compute with as many
    threads. Media are decoded twice, first to measure them.

    Raises:
        PureKVError: two samples share an id; or what `Pool.map` raises; or a batch was lost.
    """
    check_ids(samples)
    done = done or {}
    sizes = {name: Size(record.pixels or 0, record.sound) for name, record in done.items()}
    unread = [sample for sample in samples if sample.id not in done]
    for number, size in pool.map(SizeJob(job.checkpoint), unread):
        sizes[unread[number].id] = _found(size, [unread[number]])

    def read(sample: Sample) -> Size:
        size = sizes[sample.id]
        if size.unreadable is not None:
            raise PureKVError(size.unreadable)
        return size

    batches = []
    for group in make_groups(samples, batch_size, read, done):
        if isinstance(group, Record):
            yield [group]
        else:
            batches.append(group.samples)
    for number, records in pool.map(job, batches):
        yield _found(records, batches[number])


def _found(result: Any, samples: Sequence[Sample]) -> Any:
    """The result, if there is one. An evaluation counts all samples or none."""
    if isinstance(result, Lost):
        names = ", ".join(sample.id for sample in samples)
        raise PureKVError(f"samples {names}: {result.reason}; lower --batch or --num-actors")
    return result
