"""`purekv reference`: data and checkpoint."""

import json
from pathlib import Path

import pytest

from purekv.evals import read_samples


@pytest.mark.parametrize("frames", ["1", "4"])
def test_data_is_what_evaluation_reads(cli, tmp_path: Path, frames: str) -> None:
    arguments = ["--n", "3", "--seed", "7", "--frames", frames, "--size", "168"]
    code, out, _ = cli("reference", "data", str(tmp_path / "a"), *arguments)
    assert code == 0
    samples = read_samples(out.strip())
    assert len(samples) == 3
    for sample in samples:
        assert all(path.is_file() for path in sample.videos + sample.images)
    code, out, _ = cli("reference", "data", str(tmp_path / "b"), *arguments, "--json")
    assert json.loads(out) == {"data": str(tmp_path / "b" / "data.jsonl"), "n": 3, "seed": 7}
    names = [path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.*")]
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["--frames", "3"], "even"),
        (["--size", "100"], "multiple of 28"),
        (["--n", "0"], "at least 1"),
    ],
)
def test_bad_sizes_are_named(cli, tmp_path: Path, arguments: list[str], names: str) -> None:
    code, out, err = cli("reference", "data", str(tmp_path), *arguments)
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith("error:")
    assert names in err


def test_build_leaves_a_folder_of_other_files_alone(cli, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    code, _, err = cli("reference", "build", str(tmp_path))
    assert code == 2
    assert "error:" in err
    assert (tmp_path / "thesis.txt").exists()
