"""`purekv bench`: one JSON object, readable tables, and bad input in one line."""

import json
import sys

import pytest
from rich.cells import cell_len

from tests.processes import run

TINY = ("bench", "--shapes", "tiny", "--tokens", "64", "--repeats", "1", "--decode-tokens", "2")
TOP = {"device", "torch", "transformers", "commit", "config", "rows"}


def test_shapes(cli_json, tmp_path) -> None:
    out = tmp_path / "new" / "bench.json"
    data = cli_json(
        *TINY, "--batch", "1,2", "--methods", "clie,snapkv", "--budgets", "0.5,20", "--out", out
    )
    assert data.keys() == TOP
    assert data == json.loads(out.read_text())
    assert [path.name for path in out.parent.iterdir()] == ["bench.json"]
    assert data["config"]["model"] == "tiny"
    assert {row["batch"] for row in data["rows"]} == {None, 1, 2}
    measured = {
        (row["scorer"], row["budget"]) for row in data["rows"] if row["what"] == "lm_prefill"
    }
    scorers = [("clie", 0.5), ("clie", 20), ("snapkv", 0.5), ("snapkv", 20)]
    assert measured == {(None, 1.0), *scorers}
    (video,) = (row for row in data["rows"] if row["what"] == "decode_video")
    assert video["skipped"]


def test_a_checkpoint_and_a_video(cli_json, checkpoint, video) -> None:
    data = cli_json(
        *("bench", "--model", checkpoint, "--video", video, "--repeats", "1"),
        *("--decode-tokens", "2"),
    )
    whats = {row["what"] for row in data["rows"] if row["skipped"] is None}
    assert whats == {"decode_video", "vision", "lm_prefill", "ttft", "decode", "overhead"}
    (clip,) = (row for row in data["rows"] if row["what"] == "decode_video")
    assert clip["frames"] == 16
    assert {row["tokens"] for row in data["rows"]} == {None, 8 * 2 * 3}
    assert data["config"]["model"] == checkpoint.name  # no place on this machine
    assert data["config"]["video"] == video.name


def test_a_video_is_cut_or_played_again(cli_json, checkpoint, video) -> None:
    data = cli_json(
        *("bench", "--model", checkpoint, "--video", video, "--repeats", "1"),
        *("--tokens", "12,90", "--phases", "lm_prefill"),
    )
    assert sorted({row["tokens"] for row in data["rows"]}) == [12, 90]


def test_tables_fit_a_narrow_terminal(cli, checkpoint, video, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = cli(
        *("bench", "--model", checkpoint, "--video", video, "--repeats", "1"),
        *("--methods", "clie,snapkv", "--decode-tokens", "2"),
    )
    assert code == 0
    for text in ("48 visual tokens, batch 1", "full, sdpa", "snapkv 0.2", "vs", "tail", "skipped"):
        assert text in out
    assert max(cell_len(line) for line in out.splitlines()) <= 80


def test_stdout_holds_one_object_and_stderr_the_progress() -> None:
    done = run([sys.executable, "-c", "from purekv.cli import main; main()", *TINY, "--json"])
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    assert json.loads(done.stdout).keys() == TOP
    assert "loading the model" in done.stderr


BAD = {
    "shapes": (("--shapes", "huge"), "qwen2.5-vl-7b, qwen2.5-vl-72b, tiny"),
    "shapes and model": (("--shapes", "tiny", "--model", "x"), "leave out --model"),
    "shapes and video": (("--shapes", "tiny", "--video", "x"), "leave out --video"),
    "tokens": (("--tokens", "many"), "1000,4000"),
    "no tokens": (("--tokens", "0"), "1 or more"),
    "empty tokens": (("--tokens", ","), "is empty"),
    "batch": (("--batch", "-1"), "batch='-1'"),
    "method": (("--methods", "clie,magic"), "snapkv"),
    "no method": (("--methods", ""), "is empty"),
    "budget": (("--budgets", "0.2,1"), "ambiguous"),
    "budget above the tokens": (
        ("--shapes", "tiny", "--tokens", "1000,64", "--budgets", "65"),
        "65",
    ),
    "layer": (("--shapes", "tiny", "--source-layers", "9"), "layers are 0 to 5"),
    "evict": (("--evict", "never"), "post"),
    "first token": (("--first-token", "second"), "exact"),
    "baseline": (("--baselines", "fast"), "sdpa, flash, eager"),
    "phase": (("--phases", "sleep"), "ttft"),
    "repeats": (("--repeats", "0"), "repeats=0"),
    "decode tokens": (("--decode-tokens", "0"), "decode_tokens=0"),
    "device": (("--shapes", "tiny", "--device", "abacus"), "auto, cpu, cuda"),
    "missing GPU": (("--device", "cuda:7"), "not on this machine"),
    "dtype": (("--shapes", "tiny", "--dtype", "int3"), "float32"),
    "video": (("--video", "{tmp}/none.mp4"), "not found"),
    "model": (("--model", "{tmp}/none"), "not found"),
    "out is a directory": (("--shapes", "tiny", "--out", "{tmp}"), "is a directory"),
    "out below a file": (("--shapes", "tiny", "--out", "{tmp}/file/b.json"), "cannot be written"),
    "tokens below a frame": (
        ("--model", "{model}", "--video", "{video}", "--tokens", "1"),
        "6 visual tokens a frame",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_ends_before_any_work(
    cli, case, tmp_path, checkpoint, video, monkeypatch
) -> None:
    def work(*args: object, **kwargs: object) -> None:
        raise AssertionError("work began")

    monkeypatch.setattr("purekv.bench.subjects.random_model", work)
    monkeypatch.setattr("purekv.loading.Checkpoint.model", work)
    monkeypatch.setattr("purekv.reference.model.default_checkpoint", work)
    (tmp_path / "file").touch()
    words, message = BAD[case]
    names = {"tmp": tmp_path, "model": checkpoint, "video": video}
    code, out, err = cli("bench", *(word.format(**names) for word in words), "--json")
    errors = [line for line in err.splitlines() if not line.endswith(" ...")]
    assert code == 2
    assert out == ""
    assert len(errors) == 1, err
    assert errors[0].startswith("error: ")
    assert message in errors[0]
