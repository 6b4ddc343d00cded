"""A tiny Qwen2.5-VL checkpoint: the real classes, random weights, a tokenizer of its own."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

SPECIAL = {
    "pad_token": "<|endoftext|>",
    "eos_token": "<|im_end|>",
    "im_start": "<|im_start|>",
    "vision_bos_token": "<|vision_start|>",
    "vision_eos_token": "<|vision_end|>",
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
}

CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% for part in message.content -%}
{%- if part.type == 'video' -%}<|vision_start|><|video_pad|><|vision_end|>
{%- elif part.type == 'image' -%}<|vision_start|><|image_pad|><|vision_end|>
{%- else -%}{{ part.text }}{%- endif -%}
{%- endfor -%}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
{% endif -%}"""

_SIZE = {"shortest_edge": 16 * 16, "longest_edge": 48 * 48}
_PATCHES = {"patch_size": 8, "merge_size": 2, "temporal_patch_size": 2, "size": _SIZE}


def tiny_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    """One token a byte, and the special tokens; `special` ones by their names."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    extra = {
        name: token for name, token in SPECIAL.items() if name not in ("pad_token", "eos_token")
    } | special
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        padding_side="left",
        pad_token=SPECIAL["pad_token"],
        eos_token=SPECIAL["eos_token"],
        extra_special_tokens=extra,
    )


def tiny_processor() -> Qwen2_5_VLProcessor:
    return Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(**_PATCHES),
        tiny_tokenizer(),
        Qwen2VLVideoProcessor(**_PATCHES),
        chat_template=CHAT_TEMPLATE,
    )


def tiny_model(
    seed: int = 0, num_hidden_layers: int = 3, heads: tuple[int, int] = (4, 2)
) -> Qwen2_5_VLForConditionalGeneration:
    """`heads`: of attention, and of keys and values; each is 16 wide."""
    ids = tiny_tokenizer().convert_tokens_to_ids
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 320,
            "hidden_size": 16 * heads[0],
            "intermediate_size": 96,
            "num_hidden_layers": num_hidden_layers,
            "num_attention_heads": heads[0],
            "num_key_value_heads": heads[1],
            "max_position_embeddings": 8192,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [2, 3, 3],
            },
            "bos_token_id": None,
            "eos_token_id": ids(SPECIAL["eos_token"]),
            "pad_token_id": ids(SPECIAL["pad_token"]),
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "out_hidden_size": 16 * heads[0],
            "patch_size": 8,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 32,
            "fullatt_block_indexes": [1],
            "tokens_per_second": 1,
        },
        image_token_id=ids(SPECIAL["image_token"]),
        video_token_id=ids(SPECIAL["video_token"]),
        vision_start_token_id=ids(SPECIAL["vision_bos_token"]),
        vision_end_token_id=ids(SPECIAL["vision_eos_token"]),
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:  # far from uniform attention, so that evicting the wrong key shows
                weight.normal_(0, weight.shape[-1] ** -0.5 * (2.0 if "q_proj" in name else 1.0))
    model.generation_config.eos_token_id = ids(SPECIAL["eos_token"])
    model.generation_config.pad_token_id = ids(SPECIAL["pad_token"])
    # Random weights would, where trained ones do not, write placeholders of pixels.
    model.generation_config.suppress_tokens = [
        ids(SPECIAL["image_token"]),
        ids(SPECIAL["video_token"]),
    ]
    return model


def save_tiny_checkpoint(directory: Path) -> Path:
    """A directory that `AutoProcessor` and `AutoModelForImageTextToText` load."""
    tiny_model().save_pretrained(directory)
    tiny_processor().save_pretrained(directory)
    return directory
