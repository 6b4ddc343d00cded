"""The highest memory use while a block of code runs."""

import resource
import sys
from pathlib import Path
from types import TracebackType

import torch

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


class PeakMemory:
    """Bytes at the worst moment inside the block, model weights included.

    On CUDA devices what torch had allocated on all of them; on the CPU the process's resident set.
    Where the system cannot reset the resident set's high-water mark, it is that of the whole
    process so far.

        with PeakMemory(model.device) as peak:
            model.generate(**inputs)
        peak.bytes
    """

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"
        self.bytes = 0

    def __enter__(self) -> "PeakMemory":
        if self._on_cuda:
            for index in range(torch.cuda.device_count()):
                torch.cuda.reset_peak_memory_stats(index)
        else:
            _reset_resident_peak()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._on_cuda:
            devices = range(torch.cuda.device_count())
            self.bytes = sum(torch.cuda.max_memory_allocated(index) for index in devices)
        else:
            self.bytes = _resident_peak()


def _reset_resident_peak() -> None:
    try:
        _CLEAR_REFS.write_text("5")
    except OSError:
        return


def _resident_peak() -> int:
    if _STATUS.exists():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
