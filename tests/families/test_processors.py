"""Prompts that transformers' own processors write, for families whose frames have text between."""

from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, PreTrainedTokenizerFast
from transformers.models.smolvlm import processing_smolvlm
from transformers.video_utils import VideoMetadata

from purekv.families import FAMILIES
from tests.families.zoo import ZOO

PATCHES = {
    "patch_size": 4,
    "merge_size": 2,
    "temporal_patch_size": 2,
    "size": {"shortest_edge": 64, "longest_edge": 4096},
}


def tokenizer(**special: str) -> PreTrainedTokenizerFast:
    """One token a byte: as much text between frames as can be."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(alphabet)}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, padding_side="left", pad_token="<pad>", extra_special_tokens=special
    )


def layout_of(
    name: str, processor: Any, text: str, image: bool, nested: bool = False, **config: Any
) -> list[tuple]:
    """Spans of a prompt with an image of 16 x 32 pixels, if any, and six frames of 16 x 16."""
    random = np.random.default_rng(0)
    frames = torch.from_numpy(random.integers(0, 256, (6, 3, 16, 16), dtype=np.uint8))
    metadata = VideoMetadata(6, fps=1.0, duration=6.0, frames_indices=list(range(6)))
    pictures = [random.integers(0, 256, (16, 32, 3), dtype=np.uint8)] if image else None
    inputs = processor(
        text=[text], images=pictures, return_tensors="pt",
        videos=[[frames]] if nested else [frames],
        videos_kwargs={
            "video_metadata": [[metadata]] if nested else [metadata], "do_sample_frames": False
        },
    )  # fmt: skip
    made = AutoConfig.for_model(name, **{**ZOO[name].config(), **config})
    made.image_token_id = processor.image_token_id
    spans = FAMILIES[name].layout(made, dict(inputs)).spans[0]
    return [(span.modality, span.grid, span.continues) for span in spans]


def video(count: int, *size: int) -> list[tuple]:
    return [("video", (1, *size), number > 0) for number in range(count)]


@pytest.fixture
def glm() -> tuple[Any, dict[str, int]]:
    ids = tokenizer(
        image_token="<|image|>", video_token="<|video|>", a="<|begin_of_image|>",
        b="<|end_of_image|>", c="<|begin_of_video|>", d="<|end_of_video|>",
    )  # fmt: skip
    processor = transformers.Glm4vProcessor(
        transformers.Glm4vImageProcessor(**PATCHES),
        ids,
        transformers.Glm4vVideoProcessor(**PATCHES),
    )
    marks = ids.convert_tokens_to_ids(["<|begin_of_video|>", "<|end_of_video|>"])
    return processor, dict(zip(("video_start_token_id", "video_end_token_id"), marks, strict=True))


def test_glm4v(glm):
    text = (
        "a <|begin_of_image|><|image|><|end_of_image|> "
        "<|begin_of_video|><|video|><|end_of_video|> who?"
    )
    found = layout_of("glm4v", glm[0], text, image=True, **glm[1])
    assert found == [("image", (1, 2, 4), False), *video(3, 2, 2)]


def test_qwen3_vl():
    ids = tokenizer(
        image_token="<|image_pad|>", video_token="<|video_pad|>",
        vision_bos_token="<|vision_start|>", vision_eos_token="<|vision_end|>",
    )  # fmt: skip
    processor = transformers.Qwen3VLProcessor(
        transformers.Qwen2VLImageProcessor(**PATCHES), ids,
        transformers.Qwen3VLVideoProcessor(**PATCHES),
    )  # fmt: skip
    text = "a <|vision_start|><|image_pad|><|vision_end|> <|vision_start|><|video_pad|><|vision_end|> who?"  # noqa: E501
    found = layout_of(
        "qwen3_vl", processor, text, image=True,
        video_token_id=ids.convert_tokens_to_ids("<|video_pad|>"),
    )  # fmt: skip
    assert found == [("image", (1, 2, 4), False), *video(3, 2, 2)]


def test_internvl():
    ids = tokenizer(
        start_image_token="<img>", end_image_token="</img>",
        context_image_token="<IMG_CONTEXT>", video_token="<video>",
    )  # fmt: skip
    size = {"height": 16, "width": 16}
    processor = transformers.InternVLProcessor(
        transformers.GotOcr2ImageProcessor(size=size, min_patches=1, max_patches=4), ids,
        transformers.InternVLVideoProcessor(size=size), image_seq_length=4,
    )  # fmt: skip
    text = "a <IMG_CONTEXT>\nand <video>\nwho?"
    found = layout_of("internvl", processor, text, image=True)
    assert found == [*[("image", (1, 2, 2), False)] * 3, *video(6, 2, 2)]


def test_video_llama_3():
    ids = tokenizer(image_token="<image>", video_token="<video>")
    size = PATCHES["size"]
    processor = transformers.VideoLlama3Processor(
        transformers.VideoLlama3ImageProcessor(patch_size=4, merge_size=1, size=size), ids,
        transformers.VideoLlama3VideoProcessor(patch_size=4, merge_size=2, size=size),
    )  # fmt: skip
    found = layout_of(
        "video_llama_3", processor, "a <image> <video> who?", image=True,
        video_token_id=ids.convert_tokens_to_ids("<video>"),
    )  # fmt: skip
    assert found == [("image", (1, 1, 32), False), *video(6, 1, 4)]


@pytest.mark.parametrize("image", [False, True])
def test_smolvlm(monkeypatch, image):
    # Its processor writes the number of frames in words, by a package that we do not need.
    monkeypatch.setattr(processing_smolvlm, "is_num2words_available", lambda: True)
    monkeypatch.setattr(processing_smolvlm, "num2words", str, raising=False)
    places = {f"p{y}{x}": f"<row_{y}_col_{x}>" for y in range(1, 5) for x in range(1, 5)}
    ids = tokenizer(
        fake_image_token="<fake_token_around_image>", image_token="<image>",
        end_of_utterance_token="<end_of_utterance>", global_image_token="<global-img>", **places,
    )  # fmt: skip
    size = {"size": {"longest_edge": 32}, "max_image_size": {"longest_edge": 16}}
    sampling = {"fps": 1, "max_frames": 8, "video_size": {"longest_edge": 16}}
    processor = transformers.SmolVLMProcessor(
        transformers.SmolVLMImageProcessor(**size), ids,
        transformers.SmolVLMVideoProcessor(
            size={"longest_edge": 16}, max_image_size={"longest_edge": 16},
            video_sampling=sampling,
        ),
        image_seq_len=4,
    )  # fmt: skip
    found = layout_of("smolvlm", processor, "a <video> who?", image=False, nested=True)
    assert found == video(6, 2, 2)
    if image:
        picture = np.random.default_rng(0).integers(0, 256, (16, 32, 3), dtype=np.uint8)
        inputs = processor(text=["a <image> who?"], images=[[picture]], return_tensors="pt")
        config = AutoConfig.for_model("smolvlm", **ZOO["smolvlm"].config())
        config.image_token_id = processor.image_token_id
        spans = FAMILIES["smolvlm"].layout(config, dict(inputs)).spans[0]
        assert [(span.modality, span.grid) for span in spans] == [("image", (1, 2, 2))] * 3
