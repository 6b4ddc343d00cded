"""The script that makes all published results: who runs beside whom, and what failures leave."""

import sys
from pathlib import Path

import pytest
import typer

from purekv.cli.app import app
from tests.processes import run

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import everything

WRITES = """\
import os, sys, time
time.sleep({seconds})
open(sys.argv[-1], "w").write(os.environ["CUDA_VISIBLE_DEVICES"])
"""


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, everything.Result]:
    """Results that scripts of a line or two make."""
    results = {}
    for name, seconds, gpus in (("one", 1, 1), ("two", 0, 1), ("both", 0, 2), ("slow", 60, 1)):
        (tmp_path / f"{name}.py").write_text(WRITES.format(seconds=seconds))
        results[name] = everything.Result(str(tmp_path / f"{name}.py"), gpus)
    results["bad"] = everything.Result("-c raise(SystemExit(3))")
    monkeypatch.setattr(everything, "MADE", results)
    return results


def test_each_has_gpus_of_its_own_and_failures_are_named(made, tmp_path: Path) -> None:
    failed = everything.make(["one", "bad", "two", "both"], 2, None, tmp_path, 2)
    assert failed == ["bad"]
    found = {name: (tmp_path / f"{name}.json").read_text() for name in ("one", "two", "both")}
    assert found["one"] == "0"
    assert found["two"] == "1"
    assert sorted(found["both"]) == [",", "0", "1"]


def test_what_is_late_is_stopped(made, tmp_path: Path) -> None:
    assert everything.make(["slow", "one"], 1, None, tmp_path, 1 / 60) == ["slow", "one"]
    assert not (tmp_path / "slow.json").exists()


def test_every_command_names_a_script_and_options_that_it_has() -> None:
    bench = typer.main.get_command(app).commands["bench"]  # type: ignore[attr-defined]
    for name, result in everything.MADE.items():
        words = result.words.split()
        script = next(Path(word).name for word in words if word.endswith(".py"))
        options = {word for word in words if word.startswith("--")} - {
            "--standalone", "--nproc-per-node"
        }  # fmt: skip
        text = (everything.HERE / script).read_text()
        if script == "prefill_overhead.py":  # hands them on to `purekv bench`
            options -= {option for parameter in bench.params for option in parameter.opts}
        assert all(f'"{option}"' in text for option in options), name


def test_a_machine_with_too_few_gpus_is_told_before_anything_runs(tmp_path: Path) -> None:
    words = [everything.__file__, "--gpus", "1", "--only", "tensor_parallel_2"]
    done = run([sys.executable, *words, "--out", tmp_path])
    assert done.returncode == 2
    assert "tensor_parallel_2: more GPUs than the 1 here" in done.stderr
