"""`purekv serve`, up to the moment at which vLLM takes over."""

import json
import os
import tempfile
from pathlib import Path

import pytest

from purekv.cli import main
from purekv.cli import serve as verb
from purekv.serving.counters import FOLDER


@pytest.fixture
def executed(monkeypatch, tmp_path) -> list[list[str]]:
    commands: list[list[str]] = []
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(os, "environ", {})
    monkeypatch.setattr(os, "execv", lambda path, command: commands.append(command))
    monkeypatch.setattr(verb, "find_spec", lambda name: object())
    return commands


def test_own_options_become_settings_and_others_pass(executed):
    with pytest.raises(SystemExit) as left:
        main(["serve", "MODEL", "--budget", "0.1", "--port", "8001", "--source-layers", "1,3"])
    assert left.value.code == 0
    (command,) = executed
    settings = json.loads(command[command.index("--additional-config") + 1])["purekv"]
    assert settings["budget"] == 0.1
    assert settings["source_layers"] == [1, 3]
    assert command[-2:] == ["--port", "8001"]
    assert command[command.index("--model") + 1] == "MODEL"
    assert not list(Path(os.environ[FOLDER]).iterdir())


def test_on_a_gpu_the_runner_that_was_looked_into_is_chosen(executed, monkeypatch):
    monkeypatch.setattr("purekv.serving.command.this_device", lambda: "cuda")
    with pytest.raises(SystemExit):
        main(["serve", "MODEL"])
    assert "purekv.serving.cuda_worker.CompactingCUDAWorker" in executed[0]
    assert os.environ["VLLM_USE_V2_MODEL_RUNNER"] == "0"


def test_a_folder_for_counters_that_the_user_named_is_used(executed):
    os.environ[FOLDER] = "mine"
    with pytest.raises(SystemExit):
        main(["serve", "MODEL"])
    assert os.environ[FOLDER] == "mine"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--budget", "1.0"], "write a share of the prompt below 1"),
        (["--scorer", "h2o"], "scorers here are"),
        (["--worker-cls", "x"], "set by purekv serve"),
    ],
)
def test_bad_settings_end_in_one_line(executed, capsys, words, message):
    with pytest.raises(SystemExit) as left:
        main(["serve", "MODEL", *words])
    assert left.value.code == 2
    assert message in capsys.readouterr().err
    assert not executed


def test_without_vllm_the_extra_is_named(monkeypatch, capsys):
    monkeypatch.setattr(verb, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        main(["serve", "MODEL"])
    assert "pip install 'purekv[vllm]'" in capsys.readouterr().err
