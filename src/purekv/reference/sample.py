"""The sample clip: ten seconds of footage with objects and a code laid over, and its questions."""

from __future__ import annotations

import json
from pathlib import Path

ASSETS = Path(__file__).parent / "assets"


def sample_video() -> Path:
    return ASSETS / "sample.mp4"


def sample_turns() -> list[dict[str, str]]:
    """`{"category", "question", "answer"}`, in the order in which to ask."""
    turns: list[dict[str, str]] = json.loads((ASSETS / "sample.json").read_text())["turns"]
    return turns


def sample_questions() -> list[str]:
    return [turn["question"] for turn in sample_turns()]
