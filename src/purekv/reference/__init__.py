"""The embedded reference model: a tiny trained video-language model, its questions and its data."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .data import write_dataset
    from .model import build, default_checkpoint
    from .sample import sample_questions, sample_video

__all__ = ["build", "default_checkpoint", "sample_questions", "sample_video", "write_dataset"]
_HOMES = {
    "build": "model", "default_checkpoint": "model", "sample_questions": "sample",
    "sample_video": "sample", "write_dataset": "data",
}  # fmt: skip


def __getattr__(name: str) -> object:
    """Loads on first use: scenes need numpy alone."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
