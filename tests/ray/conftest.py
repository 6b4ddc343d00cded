import json
from pathlib import Path

import pytest

from tests.questions import write_questions
from tests.tiny import save_tiny_checkpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen clips, one or two questions each and no answers; and a broken one."""
    folder = tmp_path_factory.mktemp("data")
    lines = write_questions(folder, 16, broken_at=5)
    for line in lines:
        if line["id"] != "bad":
            line["turns"] = line["turns"][: 1 + line["id"] % 2]
    (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder
