"""A data set of small clips and questions without answers, and one clip that is none."""

from pathlib import Path
from typing import Any

from tests.media.clips import write_video


def write_questions(folder: Path, count: int, broken_at: int) -> list[dict[str, Any]]:
    """Writes clips; returns the lines about them, with two turns each. "bad" cannot be read."""
    lines: list[dict[str, Any]] = []
    for number in range(count):
        write_video(folder / f"{number}.mp4", num_frames=24 + 24 * (number % 2))
        turns = [
            {"question": f"what is {number}?"},
            {"question": "which?", "choices": ["red", "green"]},
        ]
        lines.append({"id": number, "video": f"{number}.mp4", "turns": turns})
    (folder / "broken.mp4").write_bytes(b"not a video")
    lines.insert(broken_at, {"id": "bad", "video": "broken.mp4", "turns": turns})
    return lines
