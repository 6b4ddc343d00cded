"""Qwen2.5-VL: images and videos under three-dimensional positions, against transformers.

Needs a torchvision that fits the environment's torch, which `make test-vllm` cannot get from PyPI.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from purekv.scoring.clie import default_source_layers
from purekv.serving.settings import ServingConfig
from tests.vllm.conftest import BLOCK_SIZE, SETTINGS, Engines
from tests.vllm.prompts import random_prompts
from tests.vllm.reference import Reference

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("torchvision") is None, reason="needs torchvision for this torch"),
]

START, END, IMAGE, VIDEO = range(256, 260)
NEW, LAYERS = 48, 5
FRAMES = (6,)
PATCHES = {"patch_size": 8, "merge_size": 2, "temporal_patch_size": 2}
SIZE = {"shortest_edge": 32**2, "longest_edge": 512**2}


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random one, in which a token is 16 by 16 pixels, of two frames in videos."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    names = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    folder = tmp_path_factory.mktemp("tiny-qwen2.5-vl")
    torch.manual_seed(0)
    config = transformers.Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 272,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            "initializer_range": 0.2,
            "bos_token_id": None,
            "eos_token_id": None,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [4, 6, 6],
            },
        },
        vision_config={
            "depth": 2,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 2,
            "out_hidden_size": 128,
            "patch_size": 8,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 32,
            "fullatt_block_indexes": [1],
            "initializer_range": 0.2,
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
        tie_word_embeddings=False,
    )
    transformers.Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    vocabulary = {name: one for one, name in enumerate([f"t{one}" for one in range(256)] + names)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = ("vision_bos_token", "vision_eos_token", "image_token", "video_token")
    transformers.Qwen2_5_VLProcessor(
        transformers.Qwen2VLImageProcessor(size=SIZE, **PATCHES),
        transformers.PreTrainedTokenizerFast(
            tokenizer_object=words, extra_special_tokens=dict(zip(special, names, strict=True))
        ),
        transformers.Qwen2VLVideoProcessor(size=SIZE, do_sample_frames=False, **PATCHES),
    ).save_pretrained(folder)
    return folder


def words(length: int, seed: int) -> list[int]:
    return [one % 256 for one in random_prompts([length], seed)[0]]


SEEN = [START, IMAGE, END]
PROMPTS = [
    [*words(12, 1), *SEEN, *words(20, 2)],
    [*words(10, 3), *SEEN, *words(15, 4), *SEEN, *words(30, 5)],
    [*words(150, 6), *SEEN, *words(90, 7)],  # more text than the budget
    words(300, 9),
    [*words(15, 10), START, VIDEO, END, *words(25, 11)],
]


def pixels(number: int, place: int, frames: tuple[int, ...] = ()) -> "np.ndarray[Any, Any]":
    rng = np.random.default_rng(10 * number + place)
    return rng.integers(0, 256, (*frames, 256, 160 + 32 * place, 3), dtype=np.uint8)


def expected(checkpoint: Path, prompts: list[list[int]]) -> list[list[int]]:
    import transformers

    model = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(
        checkpoint, attn_implementation="eager", dtype=torch.float32
    ).eval()
    processor = transformers.Qwen2_5_VLProcessor.from_pretrained(checkpoint)
    settings = ServingConfig.from_dict(SETTINGS)
    ends = settings.sinks, settings.window
    sources = default_source_layers(LAYERS)
    reference = Reference(model, "clie", settings.room, *ends, sources, BLOCK_SIZE, (IMAGE, VIDEO))
    answers = []
    for number, prompt in enumerate(prompts):
        kinds = [(token == IMAGE) + 2 * (token == VIDEO) for token in prompt]
        media = {"mm_token_type_ids": torch.tensor([kinds])}
        if count := PROMPTS[number].count(IMAGE):
            files = [pixels(number, place) for place in range(count)]
            media |= dict(processor.image_processor(files, return_tensors="pt"))
        if VIDEO in prompt:
            clip = torch.from_numpy(pixels(number, 0, FRAMES)).permute(0, 3, 1, 2)
            media |= dict(processor.video_processor([clip], return_tensors="pt"))
            media["second_per_grid_ts"] = torch.tensor([1.0])  # two frames, of two a second
        answers.append(reference.answer(prompt, NEW, **media))
    return answers


@pytest.mark.parametrize(("chunk", "asynchronous"), [(2048, True), (400, False)])
def test_answers_are_those_of_transformers(
    engines: Engines, qwen: Path, tmp_path: Path, chunk, asynchronous
):
    from PIL import Image

    images: dict[int, list[str]] = {}
    for number, prompt in enumerate(PROMPTS):
        for place in range(prompt.count(IMAGE)):
            name = tmp_path / f"{number}-{place}.png"
            Image.fromarray(pixels(number, place)).save(name)
            images.setdefault(number, []).append(str(name))
    video = tmp_path / "video.npy"
    np.save(video, pixels(4, 0, FRAMES))
    got = engines.run(
        PROMPTS,
        [NEW] * len(PROMPTS),
        SETTINGS,
        {"asynchronous": asynchronous, "images": images, "videos": {4: [str(video)]}},
        model=str(qwen),
        skip_tokenizer_init=False,
        max_num_batched_tokens=chunk,
    )
    seen = got["prompts"]
    assert [prompt.count(IMAGE) for prompt in seen] == [160, 352, 160, 0, 0]
    assert seen[4].count(VIDEO) == 480
    assert got["answers"] == expected(qwen, seen)
    assert got["compactions"] == len(PROMPTS)
    assert got["blocks_lost"] == got["left_in_manager"] == 0
