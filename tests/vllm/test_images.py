"""Prompts with images: the same tokens as transformers with the same entries.

Idefics3, because neither its processor nor its model in vLLM wants torchvision, which has no build
for the CPU on PyPI. Each image is cut into tiles, with tags in between that are text.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from purekv.scoring.clie import default_source_layers
from purekv.serving.settings import ServingConfig
from tests.vllm.conftest import BLOCK_SIZE, SETTINGS, Engines
from tests.vllm.prompts import random_prompts
from tests.vllm.reference import Reference

pytestmark = pytest.mark.vllm

TAGS = ["<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>"]
TAGS += [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
WORDS = 512 - len(TAGS)
IMAGE = WORDS
NEW = 48
TEXT = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
VISION = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 128,
    "patch_size": 8,
    "initializer_range": 0.2,
}


@pytest.fixture(scope="module")
def idefics3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Idefics3, which sees an image of 256 by 256 as five tiles of 64 tokens."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("tiny-idefics3")
    torch.manual_seed(0)
    config = transformers.Idefics3Config(
        text_config=TEXT,
        vision_config=VISION,
        image_token_id=IMAGE,
        scale_factor=2,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    transformers.Idefics3ForConditionalGeneration(config).save_pretrained(folder)
    names = [f"t{one}" for one in range(WORDS)] + TAGS
    vocabulary = {name: one for one, name in enumerate(names)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    transformers.Idefics3Processor(
        transformers.Idefics3ImageProcessor(
            size={"longest_edge": 256}, max_image_size={"longest_edge": 128}
        ),
        transformers.PreTrainedTokenizerFast(
            tokenizer_object=words, additional_special_tokens=TAGS
        ),
        image_seq_len=64,
    ).save_pretrained(folder)
    return folder


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
def images(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Of each prompt with images, their files."""
    import numpy as np
    from PIL import Image

    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    files: dict[str, list[str]] = {}
    for number, prompt in enumerate(PROMPTS):
        for place in range(prompt.count(IMAGE)):
            name = folder / f"{number}-{place}.png"
            shape = (256, 160 + 32 * place, 3)  # the second one is cut differently
            Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(name)
            files.setdefault(str(number), []).append(str(name))
    return files


def expected(checkpoint: Path, prompts: list[list[int]], images: dict[str, list[str]]) -> Any:
    import transformers
    from PIL import Image

    model = transformers.Idefics3ForConditionalGeneration.from_pretrained(
        checkpoint, attn_implementation="eager", dtype=torch.float32
    ).eval()
    processor = transformers.Idefics3ImageProcessor.from_pretrained(checkpoint)
    settings = ServingConfig.from_dict(SETTINGS)
    sources = default_source_layers(TEXT["num_hidden_layers"])
    ends = settings.sinks, settings.window
    reference = Reference(model, "clie", settings.room, *ends, sources, BLOCK_SIZE, IMAGE)
    answers = []
    for number, prompt in enumerate(prompts):
        files = [Image.open(name) for name in images.get(str(number), ())]
        media = processor([files], return_tensors="pt") if files else {}
        known = {name: media[name] for name in ("pixel_values", "pixel_attention_mask") if files}
        answers.append(reference.answer(prompt, NEW, **known))
    return answers


@pytest.mark.parametrize(("chunk", "asynchronous"), [(2048, True), (400, False)])
def test_answers_are_those_of_transformers(
    engines: Engines, idefics3: Path, images, chunk, asynchronous
):
    got = engines.run(
        PROMPTS,
        [NEW] * len(PROMPTS),
        SETTINGS,
        {"asynchronous": asynchronous, "images": images},
        model=str(idefics3),
        skip_tokenizer_init=False,
        max_num_batched_tokens=chunk,
    )
    seen = got["prompts"]
    assert [prompt.count(IMAGE) for prompt in seen[:4]] == [320, 640, 320, 320]
    assert got["answers"] == expected(idefics3, seen, images)
    room = ServingConfig.from_dict(SETTINGS).room
    holes = [room.hole(len(prompt), BLOCK_SIZE) for prompt in seen]
    assert got["compactions"] == sum(hole is not None for hole in holes) == 5
    assert got["freed_blocks"] == sum(hole.blocks for hole in holes if hole)
    assert got["blocks_lost"] == got["left_in_manager"] == 0
