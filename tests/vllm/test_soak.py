"""Many requests over a small pool, with cancellations and preemptions: each answers as it does
where there is room for all, and no block is lost. `benchmarks/serving_soak.py` does it with 1,000.
"""

from typing import Any

import pytest

from tests.vllm.conftest import SETTINGS, Engines
from tests.vllm.traffic import ENGINE, SMALL_POOL, Traffic

pytestmark = pytest.mark.vllm

REQUESTS = 100
TRAFFIC = Traffic.random(REQUESTS)
ASKED = TRAFFIC.prompts, TRAFFIC.new_tokens, SETTINGS


@pytest.fixture(scope="module")
def undisturbed(engines: Engines) -> list[Any]:
    roomy = engines.run(*ASKED, num_gpu_blocks_override=300, **ENGINE)
    assert roomy["preemptions"] == 0
    return roomy["answers"]


@pytest.mark.parametrize("asynchronous", [True, False])
def test_random_requests_neither_leak_nor_meet(engines: Engines, undisturbed, asynchronous):
    requests = TRAFFIC.requests(asynchronous)
    tight = engines.run(*ASKED, requests, num_gpu_blocks_override=SMALL_POOL, **ENGINE)
    assert tight["preemptions"] > tight["forced_preemptions"] > 0
    assert TRAFFIC.mismatches(tight["answers"], undisturbed) == []
    assert tight["blocks_lost"] == tight["left_in_manager"] == 0
