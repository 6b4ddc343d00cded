"""The README's first command: the sample clip, the embedded model, a fifth of the cache."""

import json
import sys

from purekv.reference.sample import sample_turns
from tests.processes import run


def test_the_demo_answers_right_on_a_fifth_of_the_cache() -> None:
    words = ["run", "--video", "sample", "--budget", "0.2", "--compare", "--json"]
    done = run([sys.executable, "-c", "from purekv.cli import main; main()", *words])
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)
    assert data["compression"] >= 4.2
    assert data["kept_visual_tokens"] == data["visual_tokens"] // 5
    assert data["answers"] == [turn["answer"] for turn in sample_turns()]
    assert data["agreement"] == 1.0
