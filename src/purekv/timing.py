"""Where the seconds of a request go, measured by hooks, without waiting for the device."""

import time
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from purekv import families

Stamp: TypeAlias = float | torch.cuda.Event


class PhaseTimer:
    """Seconds spent in the vision tower, in prefill and in decode, of one model's forwards.

    A forward of several tokens counts as prefill (the vision tower's part apart), one of a single
    token as decode. Sampling between forwards is not counted.

        with PhaseTimer(model) as timer:
            model.generate(**inputs)
        timer.seconds  # {"vision": ..., "prefill": ..., "decode": ...}
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._encoders = families.for_config(model.config).encoders(model)
        self._handles: list[RemovableHandle] = []
        self._started: dict[str, Stamp] = {}
        self._encoded: list[tuple[Stamp, Stamp]] = []
        self.reset()

    def reset(self) -> None:
        """Start a new request: forget all but the pixels encoded for it and a forward under way."""
        self._intervals: dict[str, list[tuple[Stamp, Stamp]]] = {
            "encode": list(self._encoded),  # the vision tower, run by `generate` before the model
            "vision": [],  # the vision tower, run by the model
            "forward": [],
            "decode": [],
        }

    def __enter__(self) -> "PhaseTimer":
        model = self._model
        self._handles = [
            model.register_forward_pre_hook(self._start("forward"), with_kwargs=True),
            # Also after a failed forward, whose start would else be taken for the next one's.
            model.register_forward_hook(self._stop_forward, with_kwargs=True, always_call=True),
        ]
        for encoder in self._encoders:
            self._handles += [
                encoder.register_forward_pre_hook(self._start("vision"), with_kwargs=True),
                encoder.register_forward_hook(self._stop_vision),
            ]
        return self

    def __exit__(self, *exc: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds per phase so far. Waits for the device once."""
        total = {
            name: sum(elapsed(start, stop) for start, stop in intervals)
            for name, intervals in self._intervals.items()
        }
        return {
            "vision": total["encode"] + total["vision"],
            "prefill": max(0.0, total["forward"] - total["vision"]),
            "decode": total["decode"],
        }

    def _start(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            self._started[name] = _stamp(module)

        return hook

    def _stop_vision(self, module: nn.Module, args: Any, output: Any) -> None:
        interval = self._started.pop("vision"), _stamp(module)
        if "forward" in self._started:
            self._intervals["vision"].append(interval)
        else:
            self._intervals["encode"].append(interval)
            self._encoded.append(interval)

    def _stop_forward(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        start = self._started.pop("forward", None)
        self._encoded = []
        if output is not None and start is not None:
            phase = "decode" if _query_length(args, kwargs) == 1 else "forward"
            self._intervals[phase].append((start, _stamp(module)))


def _query_length(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    ids = kwargs.get("input_ids")
    if ids is None:
        ids = kwargs.get("inputs_embeds")
    if ids is None:
        ids = args[0]
    return int(ids.shape[1])


def _stamp(module: nn.Module) -> Stamp:
    return stamp(next(module.parameters()).device)


def stamp(device: torch.device) -> Stamp:
    """Now, as work queued on the device sees it."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def elapsed(start: Any, stop: Any) -> float:
    """Seconds between two stamps of one device. Waits for the later one."""
    if isinstance(start, float):
        return float(stop - start)
    stop.synchronize()
    return float(start.elapsed_time(stop) / 1000)
