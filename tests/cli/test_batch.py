"""`purekv batch`, all but Ray: answers, order, runs that go on, bad input, exit codes."""

import json
import shutil
import socket
import sys
from pathlib import Path

import pytest

from purekv import PureKV, PureKVConfig, PureKVError
from purekv.actors import Actors, Lost, check_reachable
from purekv.cli.inputs import find_actors
from purekv.loading import Checkpoint
from purekv.session import Chat, read_clip
from purekv.store import Store
from tests.one_process import OneProcess
from tests.questions import write_questions
from tests.tiny import tiny_model

FILES = "answers.jsonl", "results.json", "run.json"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    lines = write_questions(folder, 4, broken_at=1)
    lines.insert(3, {"id": "gone", "videos": ["0.mp4", "nowhere.mp4"], "turns": lines[1]["turns"]})
    (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def words(checkpoint: Path, data: Path, monkeypatch) -> list[object]:
    monkeypatch.setattr("purekv.actors.Pool", OneProcess)
    monkeypatch.setattr("purekv.actors.require_ray", lambda: None)
    return [
        "batch", "--model", checkpoint, "--data", data, "--budget", "0.5", "--max-new-tokens", "6",
        "--device", "cpu",
    ]  # fmt: skip


def read(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]


def test_every_sample_is_answered_or_says_why_not(cli, words, tmp_path) -> None:
    code, out, err = cli(*words, "--out", tmp_path, "--json")
    assert code == 3
    result = json.loads(out)
    assert (result["samples"], result["answered"], result["failed"]) == (6, 4, 2)
    assert [one["id"] for one in result["errors"]] == ["bad", "gone"]
    assert Path(result["answers"]) == tmp_path / "answers.jsonl"
    assert "failed sample bad: not a video that can be decoded" in err
    rows = read(tmp_path)
    assert [row["id"] for row in rows] == ["0", "bad", "1", "gone", "2", "3"]
    for row in rows:
        if row["id"] in ("bad", "gone"):
            assert row["answers"] == []
            assert row["kv_bytes_kept"] is None
            assert row["error"]
        else:
            assert len(row["answers"]) == 2
            assert row["visual_tokens"] > 0
            assert row["kv_bytes_kept"] < row["kv_bytes_full"]
            assert "error" not in row


def test_later_turns_follow_the_models_own_answers(cli, words, checkpoint, data, tmp_path) -> None:
    assert cli(*words, "--out", tmp_path)[0] == 3
    found = Checkpoint.find(checkpoint)
    model, processor = found.model(device="cpu"), found.processor()
    chat = Chat(model, processor, videos=[read_clip(processor, data / "1.mp4")])
    with PureKV(PureKVConfig(budget=0.5))(model):
        texts = [
            chat.ask(question, max_new_tokens=6).text
            for question in ("what is 1?", "which?\nA. red\nB. green")
        ]
    assert read(tmp_path)[2]["answers"] == texts


def test_a_killed_run_goes_on_to_the_same_bytes(cli, words, tmp_path, monkeypatch) -> None:
    assert cli(*words, "--out", tmp_path / "whole")[0] == 3
    add = Store.add

    def killed(self, records):
        add(self, records)
        if len(self.records) == 3:
            raise KeyboardInterrupt

    broken = tmp_path / "broken"
    with monkeypatch.context() as patch:
        patch.setattr(Store, "add", killed)
        assert cli(*words, "--out", broken)[0] == 130
    log = broken / "answers.jsonl"
    log.write_text(log.read_text()[:-20])  # killed while it wrote a line
    code, _, err = cli(*words, "--out", broken)
    assert code == 2
    assert "--resume" in err
    code, _, err = cli(*words, "--out", broken, "--resume", "--fps", "1")
    assert code == 2
    assert "another fps" in err
    assert cli(*words, "--out", broken, "--resume")[0] == 3
    for name in FILES:
        assert (broken / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    monkeypatch.setattr("purekv.batch.Answering.__init__", lambda *a: pytest.fail("loaded"))
    assert cli(*words, "--out", broken, "--resume")[0] == 3  # nothing left to ask


def test_a_run_does_not_go_on_with_other_weights(cli, words, checkpoint, data, tmp_path) -> None:
    theirs, same = tmp_path / "theirs", tmp_path / "same"
    for copy in (theirs, same):
        shutil.copytree(checkpoint, copy)
    out = ["--out", tmp_path / "out"]
    assert cli(*words, *out, "--model", theirs)[0] == 3
    assert cli(*words, *out, "--model", same, "--resume")[0] == 3  # the place does not matter
    tiny_model(seed=1).save_pretrained(theirs)
    code, _, err = cli(*words, *out, "--model", theirs, "--resume")
    assert code == 2
    assert "with another model;" in err


def test_failed_samples_are_asked_again_once_their_lines_are_gone(
    cli, words, data, tmp_path
) -> None:
    lines = (data / "data.jsonl").read_text().splitlines(keepends=True)
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "data.jsonl").write_text("".join([lines[0], lines[2]]))
    (folder / "0.mp4").write_bytes((data / "0.mp4").read_bytes())
    out = tmp_path / "out"
    assert cli(*words, "--data", folder, "--out", out)[0] == 3
    log = out / "answers.jsonl"
    log.write_text("".join(x for x in log.read_text().splitlines(True) if '"error"' not in x))
    (folder / "1.mp4").write_bytes((data / "1.mp4").read_bytes())
    code, text, _ = cli(*words, "--data", folder, "--out", out, "--resume")
    assert code == 0
    assert text == f"{log}: 2 answered, 0 failed\n"
    assert [row["id"] for row in read(out)] == ["0", "1"]


def test_a_sample_that_kills_its_process_is_recorded(cli, words, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(
        OneProcess, "map", lambda self, job, items: ((n, Lost()) for n in range(len(items)))
    )
    code, out, _ = cli(*words, "--out", tmp_path, "--json")
    assert code == 3
    assert json.loads(out)["answered"] == 0
    assert "died" in read(tmp_path)[0]["error"]


@pytest.mark.parametrize(
    ("more", "fix"),
    [
        (["--data", "nowhere.jsonl"], "not found"),
        (["--data", "{tmp}/no.jsonl"], "no.jsonl:1 is not a sample"),
        (["--data", "{tmp}/empty.jsonl"], "has no samples"),
        (["--budget", "1.5"], "share in (0, 1]"),
        (["--scorer", "magic"], "clie"),
        (["--source-layers", "99"], "does not exist"),
        (["--fps", "0"], "fps=0"),
        (["--max-frames", "0"], "max_frames=0"),
        (["--max-pixels", "0"], "max_pixels=0"),
        (["--max-new-tokens", "0"], "max_new_tokens=0"),
        (["--dtype", "int3"], "float32"),
        (["--device", "abacus"], "auto, cpu, cuda"),
        (["--device", "cuda:0"], "write cuda"),
        (["--num-actors", "0"], "num_actors=0"),
        (["--address", "ray://head:10001"], "write host:port, or auto"),
        (["--num-gpus-per-actor", "1.5"], "num_gpus_per_actor=1.5"),
        (["--num-gpus-per-actor", "1"], "contradict"),
        (["--model", "{tmp}/none"], "not found"),
        (["--out", "{tmp}/no.jsonl"], "no.jsonl"),
    ],
)
def test_bad_input_is_named_before_ray_is_started(
    cli, words, more, fix, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(OneProcess, "map", lambda *a: pytest.fail("started"))
    (tmp_path / "no.jsonl").write_text('{"id": 1, "video": "a.mp4", "turns": [{}]}\n')
    (tmp_path / "empty.jsonl").touch()
    more = [word.format(tmp=tmp_path) for word in more]
    code, out, err = cli(*words, "--out", tmp_path / "out", *more)
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith("error:")
    assert fix in err
    assert not (tmp_path / "out").exists()


def test_without_ray_the_extra_is_named(cli, words, tmp_path, monkeypatch) -> None:
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "ray", None)
    code, out, err = cli(*words, "--out", tmp_path / "out")
    assert (code, out) == (2, "")
    assert "pip install 'purekv[batch]'" in err
    assert not (tmp_path / "out").exists()


def test_processes_share_what_there_is(monkeypatch) -> None:
    monkeypatch.setattr("torch.get_num_threads", lambda: 8)
    assert [Actors(count).cpus for count in (1, 2, 3, 8, 20)] == [8, 4, 2, 1, 1]
    assert Actors(2, address="auto").cpus == 1


def test_a_cluster_that_is_not_there_is_no_reason_to_wait() -> None:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))  # and nobody listens
        with pytest.raises(PureKVError, match="nothing answers"):
            check_reachable(f"127.0.0.1:{one.getsockname()[1]}")


def test_devices_of_processes() -> None:
    assert find_actors(2, None, None, "cpu") == (Actors(2), "cpu")
    assert find_actors(2, "auto", None, "cuda") == (Actors(2, "auto", 1.0), "cuda")
    assert find_actors(2, "auto", 0.5, "auto") == (Actors(2, "auto", 0.5), "cuda")
    with pytest.raises(PureKVError, match="contradict"):
        find_actors(2, "auto", 0.0, "cuda")
