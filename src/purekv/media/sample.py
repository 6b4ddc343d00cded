"""The clip that ships with purekv, and questions about it."""

import json
from importlib.resources import files
from pathlib import Path

from purekv.errors import PureKVError

SAMPLE = "sample"
"""What users write instead of a path."""


def sample() -> tuple[Path, list[str]]:
    """The clip's file and its questions, in the order of a chat."""
    folder = Path(str(files("purekv"))) / "reference" / "assets"
    clip, questions = folder / "sample.mp4", folder / "sample.json"
    if not clip.is_file():
        raise PureKVError(f"this installation has no sample clip ({clip}); install purekv again")
    return clip, [turn["question"] for turn in json.loads(questions.read_text())["turns"]]
