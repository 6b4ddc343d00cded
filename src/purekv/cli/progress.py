"""Progress on stderr: live bars on a terminal, plain lines elsewhere."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn


class Step(Protocol):
    """One thing under way."""

    def advance(self, done: int, total: int) -> None: ...

    def say(self, message: str) -> None: ...


@contextmanager
def step(description: str) -> Iterator[Step]:
    """Show a step while the block runs."""
    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        lines = _Lines(console)
        lines.say(description)
        yield lines
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        yield _Bar(progress, description)


class _Lines:
    def __init__(self, console: Console) -> None:
        self._console = console

    def advance(self, done: int, total: int) -> None:
        pass

    def say(self, message: str) -> None:
        self._console.print(f"{message} ...", markup=False, soft_wrap=True)


class _Bar:
    def __init__(self, progress: Progress, description: str) -> None:
        self._progress = progress
        self._description = description
        self._task = progress.add_task(description, total=None)

    def advance(self, done: int, total: int) -> None:
        self._progress.update(self._task, completed=done, total=total)

    def say(self, message: str) -> None:
        self._progress.update(self._task, description=f"{self._description}: {message}")
