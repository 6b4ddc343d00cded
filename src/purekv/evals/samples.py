"""Data sets: one JSON object a line, media beside the file."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from purekv.errors import PureKVError


@dataclass(frozen=True)
class Turn:
    """One question and its gold answer."""

    question: str
    answer: str
    category: str


@dataclass(frozen=True)
class Sample:
    """One chat about one video or some images."""

    id: str
    videos: tuple[Path, ...]
    images: tuple[Path, ...]
    turns: tuple[Turn, ...]

    @property
    def cluster(self) -> str:
        """Samples about the same media are not independent."""
        return "|".join(str(path) for path in self.videos + self.images)


def read_samples(path: str | Path, limit: int | None = None) -> list[Sample]:
    """Read a data set in the project's format.

    Each line: `{"id", "video" | "image" | "images", "turns": [{"question", "answer"}],
    "category"?}`, media paths relative to the file.

    Raises:
        PureKVError: the file is missing, or a line is not such an object.
    """
    path = Path(path)
    if not path.is_file():
        raise PureKVError(f"data file not found: {path}")
    samples: list[Sample] = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            if limit is not None and len(samples) == limit:
                break
            try:
                samples.append(_sample(json.loads(line), path.parent))
            except (ValueError, KeyError, TypeError) as error:
                raise PureKVError(
                    f"{path}:{number} is not a sample ({error}); a line needs id, video or image "
                    "or images, and turns with question and answer"
                ) from error
    return samples


def _sample(data: Mapping[str, Any], folder: Path) -> Sample:
    images = data.get("images", [data["image"]] if "image" in data else [])
    videos = [data["video"]] if "video" in data else []
    if not images and not videos:
        raise ValueError("no media")
    category = data.get("category", "all")
    turns = tuple(
        Turn(turn["question"], turn["answer"], turn.get("category", category))
        for turn in data["turns"]
    )
    if not turns:
        raise ValueError("no turns")
    return Sample(
        str(data["id"]),
        tuple(folder / video for video in videos),
        tuple(folder / image for image in images),
        turns,
    )
