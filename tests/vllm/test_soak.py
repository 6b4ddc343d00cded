"""Many requests over a small pool, with cancellations and preemptions: each answers as it does
where there is room for all, and no block is lost."""

import random

import pytest

from tests.vllm.conftest import SETTINGS, Engines
from tests.vllm.prompts import random_prompts

pytestmark = pytest.mark.vllm

REQUESTS = 250


def test_random_requests_neither_leak_nor_meet(engines: Engines):
    rng = random.Random(0)
    prompts = random_prompts(
        [rng.choice((20, 90, 200, 350)) + rng.randrange(32) for _ in range(REQUESTS)]
    )
    new = [rng.choice((4, 20, 120)) for _ in prompts]
    arrivals = [rng.randrange(REQUESTS * 3) for _ in prompts]
    cancelled = rng.sample(range(REQUESTS), REQUESTS // 10)
    cancel = {str(one): arrivals[one] + rng.randrange(40) for one in cancelled}
    requests = {"arrivals": arrivals, "cancel": cancel, "asynchronous": True}
    shared = {"max_model_len": 512, "max_num_batched_tokens": 128}
    tight = engines.run(prompts, new, SETTINGS, requests, num_gpu_blocks_override=24, **shared)
    roomy = engines.run(prompts, new, SETTINGS, num_gpu_blocks_override=300, **shared)
    assert tight["preemptions"] > 0
    assert tight["blocks_lost"] == tight["left_in_manager"] == 0
    for one in range(REQUESTS):
        if tight["answers"][one] is None:
            assert one in cancelled
        else:
            assert tight["answers"][one] == roomy["answers"][one], one
