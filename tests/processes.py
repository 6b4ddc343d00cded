"""Commands of a test, in processes that cannot outlive it."""

import os
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path


def run(
    command: Sequence[object],
    *,
    timeout: float = 300,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run to the end; `env` is added to this process's.

    What the command starts is killed with it: a grandchild that hangs would hold a pipe open, and
    with it the test, for ever. Output goes to files for the same reason.

    Raises:
        AssertionError: it took more than `timeout` seconds; with the end of what it printed.
    """
    words = [str(word) for word in command]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(
            words, stdout=out, stderr=err, cwd=cwd, start_new_session=True,
            env={**os.environ, **(env or {})},
        )  # fmt: skip
        late = False
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            late = True
            process.terminate()  # launchers end what they put into sessions of its own
            with suppress(subprocess.TimeoutExpired):
                process.wait(30)
        finally:
            with suppress(ProcessLookupError):  # all of them have ended
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        out.seek(0)
        err.seek(0)
        done = subprocess.CompletedProcess(words, process.returncode, out.read(), err.read())
    assert not late, f"not ended after {timeout} s: {words}\n{done.stderr[-3000:]}"
    return done
