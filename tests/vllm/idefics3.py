"""A tiny random Idefics3, in files, and what transformers answers with it.

Neither its processor nor its model in vLLM wants torchvision, which has no build for the CPU on
PyPI. Each image is cut into tiles, with tags in between that are text.
"""

from pathlib import Path
from typing import Any

import torch

from purekv.scoring.clie import default_source_layers
from purekv.serving.settings import ServingConfig
from tests.vllm.conftest import BLOCK_SIZE, SETTINGS
from tests.vllm.reference import Reference

TAGS = ["<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>"]
TAGS += [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
WORDS = 512 - len(TAGS)
IMAGE = WORDS
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


CHAT = """
{%- for message in messages -%}
  {%- for part in message.content -%}
    {%- if part.type == "text" -%} {{ part.text }} {%- else -%} <image> {%- endif -%}
  {%- endfor -%}
{%- endfor -%}
"""


def write_idefics3(folder: Path) -> Path:
    """It sees an image of 256 by 256 as five tiles of 64 tokens."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

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
        chat_template=CHAT,
    ).save_pretrained(folder)
    return folder


def answers(
    checkpoint: Path, prompts: list[list[int]], images: list[list[Path]], new_tokens: int
) -> list[list[int]]:
    """Of transformers, after the eviction that a server with `SETTINGS` does.

    Args:
        prompts: with a token for each part of an image.
        images: files of each prompt.
    """
    import transformers
    from PIL import Image

    model = transformers.Idefics3ForConditionalGeneration.from_pretrained(
        checkpoint, attn_implementation="eager", dtype=torch.float32
    ).eval()
    processor = transformers.Idefics3ImageProcessor.from_pretrained(checkpoint)
    settings = ServingConfig.from_dict(SETTINGS)
    sources = default_source_layers(TEXT["num_hidden_layers"])
    ends = settings.sinks, settings.window
    reference = Reference(model, "clie", settings.room, *ends, sources, BLOCK_SIZE, (IMAGE,))
    found = []
    for prompt, files in zip(prompts, images, strict=True):
        media: dict[str, Any] = {}
        if files:
            inputs = processor([[Image.open(name) for name in files]], return_tensors="pt")
            media = {name: inputs[name] for name in ("pixel_values", "pixel_attention_mask")}
        found.append(reference.answer(prompt, new_tokens, **media))
    return found


def draw(name: Path, width: int, seed: int) -> Path:
    """A file with a random image, 256 high."""
    import numpy as np
    from PIL import Image

    pixels = np.random.default_rng(seed).integers(0, 256, (256, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(name)
    return name
