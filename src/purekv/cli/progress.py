"""Progress on stderr: live bars on a terminal, one plain line a step elsewhere."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

Advance = Callable[[int, int], None]


class Steps:
    """Announces what is going on."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False)

    @contextmanager
    def step(self, description: str) -> Iterator[Advance]:
        """Show a step while the block runs; call what it gives with (done, total) if known."""
        if not self._console.is_terminal:
            self._console.print(f"{description} ...", markup=False, soft_wrap=True)
            yield lambda done, total: None
            return
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=self._console, transient=True) as progress:
            task = progress.add_task(description, total=None)
            yield lambda done, total: progress.update(task, completed=done, total=total)
