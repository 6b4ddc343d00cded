"""Tensor parallelism on CPU processes: the same tokens, kept sets and reports as one process."""

import json
import sys
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from tests.processes import run
from tests.tiny import tiny_model

WORKER = Path(__file__).with_name("worker.py")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny")
    tiny_model(heads=(8, 4)).save_pretrained(directory)
    return directory


def launch(ranks: int, *arguments: object) -> CompletedProcess[str]:
    torchrun = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", ranks,
        "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1",
    ]  # fmt: skip
    # Everything by address: a machine's own name need not resolve.
    env = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo"}
    return run([*torchrun, *arguments], env=env)


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_agree_with_one_process(checkpoint: Path, tmp_path: Path, ranks: int) -> None:
    done = launch(ranks, WORKER, checkpoint, tmp_path / "found.json")
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert "other ranks" in found.pop("ada")
    for name, same in found.items():
        assert same["layers"] or name == "whole"
        assert (same["tokens"], same["kept"], same["reports"]) == (True, True, True), name


def test_the_benchmark_runs_on_two_ranks(tmp_path: Path) -> None:
    script = WORKER.parents[2] / "benchmarks" / "tensor_parallel.py"
    done = launch(
        2, script, "--shapes", "tiny", "--layers", "3", "--tokens", "256", "--modes", "post",
        "--device", "cpu", "--dtype", "float32", "--repeats", "1", "--steps", "1", "--out",
        tmp_path / "two.json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads((tmp_path / "two.json").read_text())["rows"]
    assert [(row["what"], row["evict"], row["gpus"]) for row in rows] == [
        ("lm_prefill", None, 2), ("decode", None, 2), ("lm_prefill", "post", 2),
        ("decode", "post", 2),
    ]  # fmt: skip
    assert rows[2]["kv_bytes"] < rows[0]["kv_bytes"] / 2
    assert rows[0]["collective_ms"] == 0 < rows[2]["collective_ms"]
