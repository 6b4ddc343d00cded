"""Processes in a session of their own, which end with all that they started."""

import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


@contextmanager
def session(command: Sequence[str | Path], **options: Any) -> "Iterator[subprocess.Popen[str]]":
    """A process, killed with its descendants on leaving the block if any is left by then."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    process = subprocess.Popen(command, env=env, text=True, start_new_session=True, **options)
    try:
        yield process
    finally:
        kill_all(process)
        process.wait(30)


def kill_all(process: "subprocess.Popen[str]") -> None:
    """The process and its descendants, who have no chance to tidy up."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
