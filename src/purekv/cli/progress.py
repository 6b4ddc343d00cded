"""Progress on stderr: live bars on a terminal, plain lines elsewhere."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

LINE_EVERY = 20.0  # seconds between lines where there is no terminal


class Step(Protocol):
    """One thing under way."""

    def advance(self, done: int, total: int) -> None: ...

    def say(self, message: str) -> None: ...


@contextmanager
def step(description: str, counted: bool = False) -> Iterator[Step]:
    """Show a step while the block runs.

    counted: show how many are done, and the time left.
    """
    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        lines = _Lines(console, description if counted else None)
        lines.say(description)
        yield lines
        return
    columns: tuple[ProgressColumn, ...] = (
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(),
    )  # fmt: skip
    if counted:
        columns += (MofNCompleteColumn(), TextColumn("left"), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        yield _Bar(progress, description)


class _Lines:
    def __init__(self, console: Console, counted: str | None) -> None:
        self._console, self._counted = console, counted
        self._began = self._said = time.monotonic()
        self._first: int | None = None

    def advance(self, done: int, total: int) -> None:
        if self._counted is None:
            return
        if self._first is None:  # what an earlier run had done took no time in this one
            self._first = done
        now = time.monotonic()
        if now - self._said < LINE_EVERY and done < total:
            return
        self._said = now
        line = f"{self._counted}: {done}/{total}"
        if done > self._first and done < total:
            left = (now - self._began) / (done - self._first) * (total - done)
            line += f", {left:.0f} s left"
        self._console.print(line, markup=False, soft_wrap=True)

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
