"""Milliseconds: CUDA events on a GPU, the performance counter on a CPU."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import ParamSpec, Self, TypeVar

import torch

from purekv.memory import PeakMemory
from purekv.timing import Stamp, elapsed, stamp

P = ParamSpec("P")
T = TypeVar("T")


class Stopwatch:
    """Milliseconds and peak bytes of a block, from an idle device to an idle device.

    with Stopwatch(device) as watch:
        work()
    watch.ms, watch.peak_bytes
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._memory = PeakMemory(device)
        self.ms = 0.0

    def __enter__(self) -> Self:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._memory.__enter__()
        self._start = stamp(self._device)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            self.ms = 1000 * elapsed(self._start, stamp(self._device))
        self._memory.__exit__(kind, error, traceback)

    @property
    def peak_bytes(self) -> int:
        return self._memory.bytes


class Laps:
    """Milliseconds by name, added up, without waiting for the device in between.

    On a GPU a lap lasts from the moment at which the queue reaches its begin to that of its end:
    while the GPU is busy, its own time; where it waits for the host, that wait too.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stamps: list[tuple[str, Stamp, Stamp]] = []

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = stamp(self._device)
        yield
        self._stamps.append((name, start, stamp(self._device)))

    def around(self, name: str, function: Callable[P, T]) -> Callable[P, T]:
        """The function, with each call a lap."""

        def timed(*args: P.args, **kwargs: P.kwargs) -> T:
            with self(name):
                return function(*args, **kwargs)

        return timed

    @property
    def ms(self) -> dict[str, float]:
        """Milliseconds by name. Waits for the device."""
        total: dict[str, float] = {}
        for name, start, stop in self._stamps:
            total[name] = total.get(name, 0.0) + 1000 * elapsed(start, stop)
        return total
