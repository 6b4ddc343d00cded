"""Bad input ends in one line on stderr and exit code 2; --debug shows where it arose."""

import functools
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import typer

Verb = TypeVar("Verb", bound=Callable[..., Any])


def explains_errors(verb: Verb) -> Verb:
    """Wrap a verb that has a `debug` argument."""

    @functools.wraps(verb)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            return verb(*args, **kwargs)
        except (ValueError, OSError, MemoryError, RuntimeError) as error:
            if kwargs.get("debug") or not _is_expected(error):
                raise
            print(f"error: {_one_line(error)}", file=sys.stderr)
            raise typer.Exit(2) from None

    return wrapped  # type: ignore[return-value]


def _is_expected(error: Exception) -> bool:
    """A bare RuntimeError is a fault in the program, not in the request."""
    ours = type(error).__module__.startswith("purekv.")
    return ours or not isinstance(error, RuntimeError) or _is_out_of_memory(error)


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"


def _one_line(error: Exception) -> str:
    if _is_out_of_memory(error):
        return "out of memory; lower --max-frames or --max-pixels"
    return " ".join(str(error).split())
