"""Turning command-line words into values; all checks beyond syntax are the library's."""

from dataclasses import fields
from typing import Any

from typer.core import TyperCommand

from purekv.errors import PureKVError

MANY_VALUES = ("--image", "--video", "--ask")


class ManyValues(TyperCommand):
    """A command without positional arguments that takes `--image a b` for `--image a --image b`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, repeat_options(args))


def repeat_options(args: list[str]) -> list[str]:
    """Name the option again before each further value of an option that takes many."""
    repeated: list[str] = []
    current, filled = None, False
    for word in args:
        if word.startswith("-"):
            name, has_value, _ = word.partition("=")
            current, filled = (name if name in MANY_VALUES else None), bool(has_value)
        elif current is not None:
            if filled:
                repeated.append(current)
            filled = True
        repeated.append(word)
    return repeated


def parse_budget(text: str) -> float | int:
    """ "0.2" is a share, "200" a count of visual tokens."""
    return _number(text, f"budget={text!r} is not a number; write a share such as 0.2 or a count")


def parse_given_budget(text: str | None) -> Any:
    """None: left to the config."""
    return None if text is None else parse_budget(text)


def parse_window(text: str) -> str | int:
    """ "question", or the last N text tokens."""
    if text == "question":
        return text
    return _integer(text, f"window={text!r}; write question or a number of text tokens")


def parse_source_layers(text: str) -> str | tuple[int, ...]:
    """ "auto", or layer numbers such as "2,8,14"."""
    if text == "auto":
        return text
    hint = f"source_layers={text!r}; write auto, or layer numbers such as 2,8,14"
    return tuple(_integer(word, hint) for word in text.split(","))


def parse_spatiotemporal(text: str) -> Any:
    """ "tile=4,min_tokens=0"; layers are written 0+4+14. What is left out keeps its default."""
    from purekv.config import SpatioTemporalConfig  # imports torch, which --help does without

    names = [one.name for one in fields(SpatioTemporalConfig)]
    hint = f"spatiotemporal={text!r}; write e.g. tile=2,min_tokens=0 with {', '.join(names)}"
    settings: dict[str, Any] = {}
    for word in split_words(text):
        name, _, value = word.partition("=")
        if name not in names:
            raise PureKVError(hint)
        numbers = tuple(_integer(number, hint) for number in value.split("+"))
        settings[name] = numbers if "+" in value else numbers[0]
    return SpatioTemporalConfig(**settings)


def split_words(text: str) -> list[str]:
    """ "clie,snapkv"."""
    return [word.strip() for word in text.split(",") if word.strip()]


def parse_words(name: str, text: str) -> list[str]:
    """As `split_words`, one or more; the name is the option's."""
    words = split_words(text)
    if not words:
        raise PureKVError(f"{name}={text!r} is empty; give one or more, separated by commas")
    return words


def parse_counts(name: str, text: str) -> list[int]:
    """ "1000,4000"; the name is the option's."""
    hint = f"{name}={text!r}; write numbers of 1 or more, such as 1000,4000"
    counts = [_integer(word, hint) for word in parse_words(name, text)]
    if min(counts) < 1:
        raise PureKVError(hint)
    return counts


def check_positive(name: str, value: int) -> None:
    if value < 1:
        raise PureKVError(f"{name}={value}; it must be at least 1")


def _integer(text: str, hint: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise PureKVError(hint) from None


def _number(text: str, hint: str) -> float | int:
    try:
        return int(text)
    except ValueError:
        pass
    try:
        return float(text)
    except ValueError:
        raise PureKVError(hint) from None
