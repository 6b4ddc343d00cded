"""`purekv eval`: the contract's rows, runs that are killed and go on, bad input."""

import json
import shutil
from pathlib import Path

import pytest

from purekv.actors import Lost
from purekv.errors import PureKVError
from purekv.loading import Checkpoint
from purekv.store import Store
from tests.media.clips import write_video
from tests.one_process import OneProcess

ROW = {
    "method", "prefill", "evict", "budget", "n", "accuracy", "ci95", "second_turn", "retention",
    "mcnemar_p", "kl", "by_category", "kv_bytes", "prefill_s", "decode_tok_s",
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    lines = []
    for number in range(6):
        write_video(folder / f"{number}.mp4", num_frames=24 + 24 * (number % 2))
        turns = [
            {"question": f"what is {number}?", "answer": "a cat", "category": "open"},
            {"question": "which?", "answer": "B", "choices": ["red", "green"]},
        ]
        lines.append({"id": number, "video": f"{number}.mp4", "turns": turns[: 1 + number % 2]})
    (folder / "broken.mp4").write_bytes(b"not a video")
    lines.insert(2, {"id": "bad", "video": "broken.mp4", "turns": turns})
    (folder / "data.jsonl").write_text("\n".join(json.dumps(line) for line in lines) + "\n")
    return folder


@pytest.fixture
def words(checkpoint: Path, data: Path) -> list[object]:
    return [
        "eval", "--model", checkpoint, "--data", data, "--methods", "clie,streaming,frames",
        "--budgets", "1.0,0.5,0.25", "--batch", "2",
    ]  # fmt: skip


def test_methods_on_fewer_tokens(cli, words) -> None:
    code, out, err = cli(*words, "--prune", "0.5", "--methods", "clie,streaming", "--json")
    assert code == 0, err
    full, *rows = json.loads(out)["rows"]
    assert [row["prune"] for row in rows] == [0.5] * 4
    half, quarter = (row["kv_bytes"] for row in rows[:2])
    assert full["kv_bytes"] > half > quarter


def test_rows_are_the_contracts(cli, words) -> None:
    code, out, err = cli(*words, "--speed-samples", "1", "--json")
    assert code == 0
    result = json.loads(out)
    names = [(row["method"], row["budget"]) for row in result["rows"]]
    assert names == [
        ("full", 1.0), ("clie", 0.5), ("clie", 0.25), ("streaming", 0.5), ("streaming", 0.25),
        ("frames", 0.5), ("frames", 0.25),
    ]  # fmt: skip
    for row in result["rows"]:
        assert row.keys() >= ROW
        assert (row["n"], row["samples"], row["second_turn"]["n"]) == (9, 6, 3)
        assert row["prefill_s"] > 0
    full, half, quarter = (row["kv_bytes"] for row in result["rows"][:3])
    assert full > half > quarter
    assert {"device", "torch", "transformers"} <= result.keys()
    (skipped,) = result["skipped"]
    assert skipped["id"] == "bad"
    assert "skipped sample bad: " in err
    code, out, _ = cli(*words, "--speed-samples", "0")
    assert code == 0
    assert "streaming" in out


def test_a_killed_run_goes_on_to_the_same_bytes(cli, words, tmp_path, monkeypatch) -> None:
    words = [*words, "--speed-samples", "0"]
    assert cli(*words, "--out", tmp_path / "whole")[0] == 0
    add, calls = Store.add, []

    def killed(self, records):
        add(self, records)
        calls.append(len(self.records))
        if len(calls) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Store, "add", killed)
        assert cli(*words, "--out", tmp_path / "broken")[0] == 130
    log = tmp_path / "broken" / "samples.jsonl"
    assert 0 < len(log.read_text().splitlines()) < 7
    assert not (tmp_path / "broken" / "results.json").exists()
    log.write_text(log.read_text()[:-20])  # killed while it wrote a line
    code, _, err = cli(*words, "--out", tmp_path / "broken")
    assert code == 2
    assert "--resume" in err
    code, _, err = cli(*words, "--out", tmp_path / "broken", "--resume", "--seed", "5")
    assert code == 2
    assert "another seed" in err
    assert cli(*words, "--out", tmp_path / "broken", "--resume")[0] == 0
    for name in ("samples.jsonl", "results.json", "run.json"):
        assert (tmp_path / "broken" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert cli(*words, "--out", tmp_path / "whole", "--resume")[0] == 0  # nothing left to ask


def test_spread_over_processes_it_is_the_same_evaluation(cli, words, tmp_path, monkeypatch) -> None:
    words = [*words, "--speed-samples", "0", "--device", "cpu"]
    assert cli(*words, "--out", tmp_path / "one")[0] == 0
    monkeypatch.setattr("purekv.actors.Pool", OneProcess)
    monkeypatch.setattr("purekv.actors.require_ray", lambda: None)
    add = Store.add

    def killed(self, records):
        add(self, records)
        if len(self.records) >= 3:
            raise KeyboardInterrupt

    spread = [*words, "--num-actors", "2", "--out", tmp_path / "two"]
    with monkeypatch.context() as patch:
        patch.setattr(Store, "add", killed)
        assert cli(*spread)[0] == 130
    assert cli(*spread, "--resume")[0] == 0
    for name in ("samples.jsonl", "results.json", "run.json"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()


def test_a_lost_batch_ends_a_spread_evaluation(cli, words, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("purekv.actors.Pool", OneProcess)
    monkeypatch.setattr("purekv.actors.require_ray", lambda: None)
    monkeypatch.setattr(
        OneProcess, "map", lambda self, job, items: ((n, Lost()) for n in range(len(items)))
    )
    code, _, err = cli(*words, "--num-actors", "2", "--device", "cpu", "--out", tmp_path)
    assert code == 2
    assert "died, 3 times" in err


def change(path: Path, keys: list[str], value: object) -> None:
    data = inner = json.loads(path.read_text())
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    path.write_text(json.dumps(data))


def test_what_numbers_depend_on_must_be_the_same_to_go_on(
    cli, words, checkpoint, tmp_path, monkeypatch
) -> None:
    out = ["--speed-samples", "0", "--limit", "1", "--out", tmp_path / "out"]
    assert cli(*words, *out)[0] == 0
    before, theirs = tmp_path / "before", tmp_path / "theirs"
    shutil.copytree(checkpoint, before)
    assert cli(*words, *out, "--resume", "--model", before)[0] == 0  # the place does not matter

    def refused_for(what: str) -> bool:
        code, _, err = cli(*words, *out, "--resume", "--model", theirs)
        shutil.rmtree(theirs)
        shutil.copytree(checkpoint, theirs)
        return code == 2 and f"with another {what};" in err

    shutil.copytree(checkpoint, theirs)
    rope = ["text_config", "rope_parameters", "rope_theta"]
    change(theirs / "config.json", rope, 500.0)
    assert refused_for("model")
    change(theirs / "generation_config.json", ["repetition_penalty"], 1.5)
    assert refused_for("model")
    change(theirs / "processor_config.json", ["image_processor", "size", "longest_edge"], 1024)
    assert refused_for("processor")
    template = theirs / "chat_template.jinja"
    template.write_text("System: be brief. " + template.read_text())
    assert refused_for("processor")
    with monkeypatch.context() as patch:
        patch.setattr("purekv.__version__", "0.0")
        assert refused_for("purekv")
    load = Checkpoint.model

    def eager(self: Checkpoint, **settings: str) -> object:
        model = load(self, **settings)
        model.set_attn_implementation("eager")
        return model

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "model", eager)
        assert refused_for("attention")


def test_a_start_that_fails_does_not_block_the_folder(cli, words, tmp_path, monkeypatch) -> None:
    def fail(*args: object) -> None:
        raise PureKVError("broken")

    words = [*words, "--speed-samples", "0", "--limit", "1", "--out", tmp_path / "out"]
    with monkeypatch.context() as patch:
        patch.setattr("purekv.evals.suite.Asking.__init__", fail)
        assert cli(*words)[0] == 2
    assert cli(*words)[0] == 0


def test_equal_ids_are_named_before_the_model_loads(cli, words, data, tmp_path, monkeypatch):
    monkeypatch.setattr("purekv.loading.Checkpoint.model", lambda *a, **k: pytest.fail("loaded"))
    line = (data / "data.jsonl").read_text().splitlines()[0]
    (tmp_path / "data.jsonl").write_text(f"{line}\n{line}\n")
    code, _, err = cli(*words, "--data", tmp_path, "--out", tmp_path / "out")
    assert code == 2
    assert "2 samples have the same id '0'" in err
    assert not (tmp_path / "out").exists()


def test_a_limit_picks_by_seed(cli, words) -> None:
    def n(*more: object) -> list[int]:
        code, out, _ = cli(*words, "--speed-samples", "0", "--json", *more)
        assert code == 0
        result = json.loads(out)
        return [row["samples"] + len(result["skipped"]) for row in result["rows"]]

    assert set(n("--limit", "3")) == {3}


def test_plots_are_drawn_of_a_finished_run_too(cli, words, tmp_path) -> None:
    words = [*words, "--out", tmp_path, "--speed-samples", "0"]
    assert cli(*words)[0] == 0
    assert not (tmp_path / "index.html").exists()
    code, _, err = cli(*words, "--resume", "--plots")
    assert code == 0
    assert err.splitlines()[-1] == f"pictures: {tmp_path / 'index.html'}"
    assert (tmp_path / "accuracy.svg").exists()


@pytest.mark.parametrize(
    ("more", "fix"),
    [
        (["--methods", "clie,magic"], "methods are clie"),
        (["--budgets", "1.5"], "share in (0, 1]"),
        (["--budgets", "x"], "not a number"),
        (["--prefill", "sparse"], "prefill='sparse' is not available"),
        (["--data", "nowhere.jsonl"], "not found"),
        (["--limit", "0"], "at least 1"),
        (["--resume"], "--out"),
        (["--plots"], "--out"),
        (["--address", "auto"], "--num-actors"),
        (["--num-actors", "0", "--device", "cpu"], "num_actors=0"),
        (["--source-layers", "99"], "does not exist"),
    ],
)
def test_bad_input_is_named_before_the_model_loads(cli, words, more, fix, monkeypatch) -> None:
    monkeypatch.setattr("purekv.loading.Checkpoint.model", lambda *a, **k: pytest.fail("loaded"))
    code, out, err = cli(*words, *more)
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith("error:")
    assert fix in err


def test_nothing_to_ask_is_an_error(cli, words, data, tmp_path) -> None:
    line = (data / "data.jsonl").read_text().splitlines()[2]
    (tmp_path / "data.jsonl").write_text(line)
    code, _, err = cli(*words, "--data", tmp_path / "data.jsonl")
    assert code == 2
    assert "none of the 1 samples" in err
