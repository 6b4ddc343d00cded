"""`purekv eval` spread over two processes: the bytes of one process."""

import json
from pathlib import Path

import pytest

from tests.ray.session import PUREKV, Session

pytestmark = pytest.mark.ray


def test_two_processes_write_the_bytes_of_one(checkpoint: Path, data: Path, tmp_path: Path):
    lines = [json.loads(line) for line in (data / "data.jsonl").read_text().splitlines()]
    for line in lines:
        line["video"] = str(data / line["video"])
        for turn in line["turns"]:
            turn["answer"] = "red"
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = [
        PUREKV, "eval", "--model", checkpoint, "--data", tmp_path, "--methods", "clie,streaming",
        "--budgets", "0.5,0.25", "--batch", "2", "--speed-samples", "0",
    ]  # fmt: skip
    with Session(*words, "--out", tmp_path / "one") as run:
        assert run.wait() == 0, run.err
    with Session(*words, "--out", tmp_path / "two", "--num-actors", "2", "--json") as run:
        assert run.wait() == 0, run.err
        assert json.loads(run.out)["rows"]
    for name in ("samples.jsonl", "results.json", "run.json"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
