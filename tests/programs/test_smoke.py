"""The smoke level of the reference suite, whole: reading, prefilling and answering with the
embedded model, from the command line to the table."""

import json
import sys
from pathlib import Path

from tests.processes import run

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "reference_suite.py"


def test_a_fifth_of_the_cache_answers_like_the_whole(tmp_path):
    out = tmp_path / "smoke.json"
    done = run(
        [sys.executable, SCRIPT, "--level=smoke", "--workers=2", "--out", out],
        env={"OMP_NUM_THREADS": "1"},
        timeout=1500,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    full, clie, snapkv, random = result["rows"]
    assert [row["method"] for row in result["rows"]] == ["full", "clie", "snapkv", "random"]
    assert all(row["what"] == "quality" for row in result["rows"])
    assert result["config"]["samples"] == 50
    assert result["config"]["seconds"]["evaluating"] > 0
    assert 576 <= full["tokens"] <= 593
    assert set(full["by_media"]) == {"video", "videos", "image", "images"}
    assert set(full["by_turn"]) == {"1", "2", "3"}
    assert full["accuracy"] > 0.8
    assert clie["retention"] > 0.85
    assert min(clie["retention"], snapkv["retention"]) > 1.5 * random["retention"]
