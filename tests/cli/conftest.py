import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from purekv.cli import main
from tests.media.clips import write_video
from tests.tiny import save_tiny_checkpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("media") / "clip.mp4", num_frames=96)


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run `purekv WORDS...` in this process: exit code, stdout, stderr."""

    def run(*words: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as leaving:
            main([str(word) for word in words])
        out, err = capsys.readouterr()
        return int(leaving.value.code or 0), out, err

    return run


@pytest.fixture
def cli_json(cli: Callable[..., tuple[int, str, str]]) -> Callable[..., dict[str, Any]]:
    def run(*words: object) -> dict[str, Any]:
        code, out, err = cli(*words, "--json")
        assert code == 0, err
        return json.loads(out)

    return run
