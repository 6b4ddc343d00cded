"""`purekv data`: dialogs of others, asked by `purekv eval`."""

import sys
from pathlib import Path

import pytest

from purekv.evals import read_samples
from purekv.evals.avsd import read_avsd
from tests.evals.test_avsd import FIRST, LAST, dialog, write
from tests.media.clips import write_video


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "videos").mkdir()
    write_video(tmp_path / "videos" / "A1.mp4", num_frames=24)
    return tmp_path


def test_the_command_writes_what_eval_reads(cli, cli_json, folder: Path) -> None:
    path = write(folder, dialog("A1", FIRST, (LAST, ["an apple", "a pear"])), dialog("C3", FIRST))
    words = ["data", "avsd", path, "--media", folder / "videos", "--out"]
    made = cli_json(*words, folder / "out" / "all.jsonl")
    assert made == {
        "data": str(folder / "out" / "all.jsonl"), "samples": 1, "questions": 2,
        "missing": ["C3"], "undisclosed": 0,
    }  # fmt: skip
    assert read_samples(made["data"]) == read_avsd(path, folder / "videos").samples
    last = cli_json(*words, folder / "last.jsonl", "--last")
    (sample,) = read_samples(last["data"])
    assert [turn.answer for turn in sample.history] == [FIRST[1]]
    assert cli(*words, folder / "last.jsonl", "--last")[0] == 0  # the same again
    code, _, err = cli(*words, folder / "last.jsonl")
    assert code == 2
    assert "name another file" in err
    assert cli(*words, folder / "new.jsonl", "--media", folder / "nowhere")[0] == 2


def test_a_missing_library_names_the_extra(cli, checkpoint, folder: Path, monkeypatch) -> None:
    path, data = write(folder, dialog("A1", FIRST)), folder / "d.jsonl"
    assert cli("data", "avsd", path, "--media", folder / "videos", "--out", data)[0] == 0
    words = ["eval", "--model", checkpoint, "--data", data, "--methods", "clie", "--budgets", "0.5",
             "--speed-samples", "0"]  # fmt: skip
    code, out, err = cli(*words)
    assert code == 0, err
    assert "CIDEr" in out
    monkeypatch.setitem(sys.modules, "pycocoevalcap.cider.cider", None)
    monkeypatch.setattr("purekv.loading.Checkpoint.model", lambda *a, **k: pytest.fail("loaded"))
    code, out, err = cli(*words)
    assert (code, out) == (2, "")
    assert "pip install 'purekv[avsd]'" in err.splitlines()[-1]


def test_other_files_are_one_line(cli, folder: Path) -> None:
    (folder / "avsd.json").write_text("[1]")
    out = folder / "d.jsonl"
    for file in ("avsd.json", "nothing.json"):
        words = ["data", "avsd", folder / file, "--media", folder / "videos", "--out", out]
        code, said, err = cli(*words)
        assert (code, said, len(err.splitlines())) == (2, "", 1)
        assert err.startswith("error: ")
    assert not out.exists()
