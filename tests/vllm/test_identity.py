"""vLLM answers what transformers does with the same entries; blocks are freed and none is lost."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch

from purekv.scoring.clie import default_source_layers
from purekv.serving.settings import ServingConfig
from tests.vllm.conftest import BLOCK_SIZE, SETTINGS, Engines
from tests.vllm.prompts import random_prompts
from tests.vllm.reference import Reference

pytestmark = pytest.mark.vllm

LENGTHS = [
    700,
    40,
    515,
    320,
    1000,
    63,
    64,
    65,
    96,
    127,
    333,
    480,
    12,
    640,
    641,
    260,
    77,
    399,
    801,
    150,
]
NEW = 48


def reference(checkpoint: Path, scorer: str) -> Reference:
    from transformers import Qwen2ForCausalLM

    model = Qwen2ForCausalLM.from_pretrained(
        checkpoint, attn_implementation="eager", dtype=torch.float32
    ).eval()
    settings = ServingConfig.from_dict({**SETTINGS, "scorer": scorer})
    sources = default_source_layers(model.config.num_hidden_layers)
    ends = settings.sinks, settings.window
    return Reference(model, scorer, settings.room, *ends, sources, BLOCK_SIZE)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    return random_prompts(LENGTHS)


@pytest.fixture(scope="module")
def expected(checkpoint: Path, prompts: list[list[int]]) -> Callable[[str], list[list[int]]]:
    @cache
    def answers(scorer: str) -> list[list[int]]:
        model = reference(checkpoint, scorer)
        return [model.answer(prompt, NEW) for prompt in prompts]

    return answers


def freed_by(settings: dict, lengths: list[int]) -> int:
    room = ServingConfig.from_dict(settings).room
    holes = (room.hole(length, BLOCK_SIZE) for length in lengths)
    return sum(hole.blocks for hole in holes if hole)


@pytest.mark.parametrize(
    ("scorer", "chunk", "asynchronous"),
    [
        ("clie", 2048, True),
        ("clie", 200, False),
        ("snapkv", 200, True),
        ("value_norm", 2048, False),
    ],
)
def test_answers_are_those_of_transformers(
    engines: Engines, prompts, expected, scorer, chunk, asynchronous
):
    settings = {**SETTINGS, "scorer": scorer}
    got = engines.run(
        prompts,
        [NEW] * len(prompts),
        settings,
        {"asynchronous": asynchronous},
        max_num_batched_tokens=chunk,
    )
    assert got["scheduler"] == ("AsyncScheduler" if asynchronous else "Scheduler")
    assert got["preemptions"] == 0
    assert got["answers"] == expected(scorer)
    assert got["freed_blocks"] == freed_by(settings, LENGTHS) > 0
    assert got["blocks_lost"] == got["left_in_manager"] == 0


@pytest.mark.parametrize("asynchronous", [True, False])
def test_preempted_requests_go_on_as_if_nothing_had_happened(
    engines: Engines, checkpoint, asynchronous
):
    prompts = random_prompts([200, 290, 320, 230, 64, 255])
    model = reference(checkpoint, "clie")
    got = engines.run(
        prompts,
        [200] * len(prompts),
        {**SETTINGS, "scorer": "clie"},
        {"asynchronous": asynchronous},
        num_gpu_blocks_override=24,
        max_model_len=640,
        max_num_batched_tokens=128,
    )
    assert got["preemptions"] > 0
    assert got["compactions"] > len(prompts)
    assert got["answers"] == [model.answer(prompt, 200) for prompt in prompts]
    assert got["blocks_lost"] == got["left_in_manager"] == 0


def test_more_requests_run_at_once_than_in_stock_vllm(engines: Engines):
    prompts = random_prompts([320 + 32 * (one % 4) for one in range(32)])
    figures = {}
    for name, settings in (("stock", None), ("purekv", SETTINGS)):
        figures[name] = engines.run(
            prompts,
            [64] * len(prompts),
            settings,
            num_gpu_blocks_override=100,
            max_model_len=1024,
            max_num_batched_tokens=512,
        )
    print({name: {key: run[key] for key in ("peak", "steps")} for name, run in figures.items()})
    assert figures["purekv"]["peak"] >= 2.5 * figures["stock"]["peak"]
    assert figures["purekv"]["steps"] < figures["stock"]["steps"]
