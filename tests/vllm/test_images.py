"""Prompts with images: the same tokens as transformers with the same entries."""

from pathlib import Path

import pytest

from purekv.serving.settings import ServingConfig
from tests.vllm.conftest import BLOCK_SIZE, SETTINGS, Engines
from tests.vllm.idefics3 import IMAGE, WORDS, answers, draw, write_idefics3
from tests.vllm.prompts import random_prompts

pytestmark = pytest.mark.vllm

NEW = 48


@pytest.fixture(scope="module")
def idefics3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_idefics3(tmp_path_factory.mktemp("tiny-idefics3"))


def words(length: int, seed: int) -> list[int]:
    return [one % WORDS for one in random_prompts([length], seed)[0]]


PROMPTS = [
    [*words(12, 1), IMAGE, *words(20, 2)],
    [*words(10, 3), IMAGE, *words(15, 4), IMAGE, *words(30, 5)],
    [*words(200, 6), IMAGE, *words(90, 7)],  # more text than the budget
    [IMAGE, *words(3, 8)],
    words(300, 9),
    words(20, 10),
]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[list[Path]]:
    """Files of each prompt."""
    folder = tmp_path_factory.mktemp("images")
    return [
        [
            draw(folder / f"{number}-{place}.png", 160 + 32 * place, seed=10 * number + place)
            for place in range(prompt.count(IMAGE))
        ]
        for number, prompt in enumerate(PROMPTS)
    ]


@pytest.mark.parametrize(
    ("chunk", "asynchronous", "preempt"), [(2048, True, []), (400, False, []), (400, True, [5, 30])]
)
def test_answers_are_those_of_transformers(
    engines: Engines, idefics3: Path, images, chunk, asynchronous, preempt
):
    got = engines.run(
        PROMPTS,
        [NEW] * len(PROMPTS),
        SETTINGS,
        {
            "asynchronous": asynchronous,
            "preempt": preempt,
            "images": {number: [str(one) for one in files] for number, files in enumerate(images)},
        },
        model=str(idefics3),
        skip_tokenizer_init=False,
        max_num_batched_tokens=chunk,
    )
    seen = got["prompts"]
    assert [prompt.count(IMAGE) for prompt in seen[:4]] == [320, 640, 320, 320]
    assert got["answers"] == answers(idefics3, seen, images, NEW)
    room = ServingConfig.from_dict(SETTINGS).room
    holes = [room.hole(len(prompt), BLOCK_SIZE) for prompt in seen]
    assert sum(hole is not None for hole in holes) == 5
    if preempt:
        assert got["preemptions"] > len(PROMPTS)
        assert got["compactions"] > 5
    else:
        assert got["compactions"] == 5
        assert got["freed_blocks"] == sum(hole.blocks for hole in holes if hole)
    assert got["blocks_lost"] == got["left_in_manager"] == 0
