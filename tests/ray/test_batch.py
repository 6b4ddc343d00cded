"""`purekv batch` on real clips: two processes, deaths among them, the whole run killed."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from purekv import PureKVConfig
from purekv.batch import AnswerJob
from purekv.evals import read_samples
from tests.ray.session import PUREKV, Session

pytestmark = pytest.mark.ray

FILES = "answers.jsonl", "results.json", "run.json"


class Batch(Session):
    def __init__(self, checkpoint: Path, data: Path, out: Path, *more: object) -> None:
        super().__init__(
            PUREKV, "batch", "--model", checkpoint, "--data", data, "--out", out,
            "--num-actors", "2", "--budget", "0.5", *more,
        )  # fmt: skip
        self.log = out / "answers.jsonl"

    def done(self) -> int:
        return self.log.read_text().count("\n") if self.log.exists() else 0


@pytest.fixture(scope="module")
def unbroken(checkpoint: Path, data: Path, tmp_path_factory) -> Iterator[Path]:
    out = tmp_path_factory.mktemp("unbroken")
    with Batch(checkpoint, data, out, "--json") as run:
        code = run.wait()
        assert code == 3, run.err  # one sample is broken
        result = json.loads(run.out)  # and nothing else was printed
        assert "Traceback" not in run.err
    assert (result["samples"], result["answered"], result["failed"]) == (17, 16, 1)
    assert [one["id"] for one in result["errors"]] == ["bad"]
    assert Path(result["answers"]) == out / "answers.jsonl"
    return out


def test_answers_are_those_of_one_process_in_the_files_order(unbroken, checkpoint, data):
    answer = AnswerJob(str(checkpoint), PureKVConfig(budget=0.5), device="cpu")()
    samples = read_samples(data / "data.jsonl", gold=False)
    expected = [json.dumps(answer(sample).to_dict()) for sample in samples]
    assert (unbroken / "answers.jsonl").read_text().splitlines() == expected


def test_a_process_is_killed_and_every_sample_is_answered_once(
    unbroken, checkpoint, data, tmp_path
):
    with Batch(checkpoint, data, tmp_path / "out") as run:
        run.wait_for(lambda: run.done() >= 3 and len(run.workers()) == 2)
        killed = run.workers()[0]
        run.kill(killed)
        assert run.done() < 15
        run.wait_for(lambda: len(set(run.workers()) - {killed}) == 2)  # another took its place
        assert run.wait() == 3, run.err
    for name in FILES:
        assert (tmp_path / "out" / name).read_bytes() == (unbroken / name).read_bytes()


def test_the_run_is_killed_and_goes_on_to_the_same_bytes(unbroken, checkpoint, data, tmp_path):
    out = tmp_path / "out"
    with Batch(checkpoint, data, out) as run:
        run.wait_for(lambda: run.done() >= 3)
        os.killpg(run.process.pid, signal.SIGKILL)
        assert run.process.wait(30) == -signal.SIGKILL
    before = run.log.read_text().splitlines()
    assert 3 <= len(before) < 17
    assert not (out / "results.json").exists()
    with Batch(checkpoint, data, out, "--resume") as run:
        assert run.wait() == 3, run.err
    for name in FILES:
        assert (out / name).read_bytes() == (unbroken / name).read_bytes()
    assert set(before) <= set(run.log.read_text().splitlines())


def test_an_item_that_kills_every_process_is_given_up_and_no_other(tmp_path):
    """Nor the one behind it, whose process ends because its device has failed."""
    with Session("-m", "tests.ray.poison", tmp_path / "begun") as run:
        assert run.wait() == 0, run.err
        found = json.loads(run.out)
    assert found == [[n, "lost" if n == 7 else n * n] for n in range(20)]
    assert (tmp_path / "begun").read_text() == "xxx"
    assert (tmp_path / "begun.failed").exists()


def test_a_model_that_does_not_load_ends_in_one_line(checkpoint, data, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in checkpoint.iterdir():
        if file.suffix != ".safetensors":
            (broken / file.name).write_bytes(file.read_bytes())
    with Batch(broken, data, tmp_path / "out") as run:
        assert run.wait() == 2, run.err
        assert run.out == ""
        assert "error: cannot load" in run.err.splitlines()[-1]
        assert "Traceback" not in run.err
    assert not (tmp_path / "out" / "run.json").exists()
