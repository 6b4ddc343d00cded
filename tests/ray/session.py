"""A command in a session of its own, of which nothing is left behind, whatever happens.

Ray's processes form groups of their own, but none leaves the session.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).parents[2]
PUREKV = Path(sys.executable).with_name("purekv")
LIMIT = 480.0
"""Seconds that anything may take."""


class Session:
    """`words` are Python's."""

    def __init__(self, *words: object) -> None:
        self._tmp = tempfile.mkdtemp(prefix="pk", dir="/tmp")  # sockets want a short path
        self._out, self._err = Path(self._tmp, "out"), Path(self._tmp, "err")
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self.process = subprocess.Popen(
                [sys.executable, *map(str, words)],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1", "RAY_TMPDIR": self._tmp},
                start_new_session=True,
            )

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *error: object) -> None:
        deadline = time.monotonic() + 30
        while members := self.members():
            assert time.monotonic() < deadline, f"these do not die: {members}"
            for pid in members:
                self.kill(pid)
            self.process.poll()  # or it stays a zombie
            time.sleep(0.1)
        shutil.rmtree(self._tmp, ignore_errors=True)

    @property
    def out(self) -> str:
        return self._out.read_text()

    @property
    def err(self) -> str:
        return self._err.read_text()

    def wait(self) -> int:
        return self.process.wait(LIMIT)

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Until it holds, while the command runs."""
        deadline = time.monotonic() + LIMIT
        while not condition():
            assert self.process.poll() is None, self.err[-4000:]
            assert time.monotonic() < deadline, self.err[-4000:]
            time.sleep(0.02)

    def members(self) -> dict[int, str]:
        """Process ids and what they call themselves."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                state, *fields = (folder / "stat").read_text().rpartition(")")[2].split()
                name = (folder / "cmdline").read_bytes().split(b"\0")[0].decode()
            except OSError:  # it has just ended
                continue
            if state not in "ZX" and int(fields[2]) == self.process.pid:
                found[int(folder.name)] = name
        return found

    def workers(self) -> list[int]:
        return [pid for pid, name in self.members().items() if "_Worker" in name]

    def kill(self, pid: int) -> None:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
