"""The README's first command: the sample clip, the embedded model, a fifth of the cache."""

import pytest

from purekv.reference.model import WEIGHTS


@pytest.mark.skipif(not any(WEIGHTS.glob("*.safetensors")), reason="weights are not trained yet")
def test_the_demo_answers_alike_on_a_fifth_of_the_cache(cli_json) -> None:
    data = cli_json("run", "--video", "sample", "--budget", "0.2", "--compare")
    assert data["compression"] >= 4.2
    assert data["kept_visual_tokens"] == data["visual_tokens"] // 5
    assert len(data["answers"]) >= 2
    assert data["answers"] == data["dense"]["answers"]
    assert data["agreement"] == 1.0
