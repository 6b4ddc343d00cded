"""The highest memory use while a block of code runs, and what is left."""

import gc
import resource
import sys
from pathlib import Path
from types import TracebackType

import torch

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


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


def free_bytes(device: torch.device) -> int | None:
    """Bytes that can still be allocated on the device; None where the system does not say."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + held
    limits = []
    if _MEMINFO.exists():
        for line in _MEMINFO.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                limits.append(int(line.split()[1]) * 1024)
    limit, used = _CGROUP / "memory.max", _CGROUP / "memory.current"  # of a container
    if limit.exists() and used.exists() and (most := limit.read_text().strip()) != "max":
        limits.append(max(0, int(most) - int(used.read_text())))
    return min(limits, default=None)


def release() -> None:
    """Give back what nothing refers to any more, on the devices as well."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


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
