import json
from pathlib import Path

import pytest

from tests.media.clips import write_video
from tests.tiny import save_tiny_checkpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen clips, one or two questions each and no answers; and a broken one."""
    folder = tmp_path_factory.mktemp("data")
    lines = []
    for number in range(16):
        write_video(folder / f"{number}.mp4", num_frames=24 + 24 * (number % 2))
        turns = [
            {"question": f"what is {number}?"},
            {"question": "which?", "choices": ["red", "green"]},
        ]
        lines.append({"id": number, "video": f"{number}.mp4", "turns": turns[: 1 + number % 2]})
    (folder / "broken.mp4").write_bytes(b"not a video")
    lines.insert(5, {"id": "bad", "video": "broken.mp4", "turns": turns})
    (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder
