"""A tiny Qwen2.5-Omni thinker: the real classes, random weights, a tokenizer of its own."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    Qwen2_5OmniProcessor,
    Qwen2_5OmniThinkerConfig,
    Qwen2_5OmniThinkerForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    WhisperFeatureExtractor,
)

from tests.tiny import tiny_tokenizer

TOKENS = {
    "image_token": "<|IMAGE|>",
    "video_token": "<|VIDEO|>",
    "audio_token": "<|AUDIO|>",
    "vision_bos_token": "<|vision_bos|>",
    "vision_eos_token": "<|vision_eos|>",
    "audio_bos_token": "<|audio_bos|>",
    "audio_eos_token": "<|audio_eos|>",
}
SECOND, FRAMES = 25, 144
"""Tokens of a second of sound; of two square frames, which the processor makes no smaller."""

_TEMPLATE = """\
{%- for message in messages -%}
[{{ message.role }}]
{%- for part in message.content -%}
{%- if part.type == 'video' -%}<|vision_bos|><|VIDEO|><|vision_eos|>
{%- elif part.type == 'image' -%}<|vision_bos|><|IMAGE|><|vision_eos|>
{%- else -%}{{ part.text }}{%- endif -%}
{%- endfor -%}<|im_end|>
{%- endfor -%}
{%- if add_generation_prompt -%}[assistant]{%- endif -%}"""
_PATCHES = {
    "patch_size": 14,
    "merge_size": 2,
    "temporal_patch_size": 2,
    "size": {"shortest_edge": 128 * 28 * 28, "longest_edge": 132 * 28 * 28},
}


def omni_processor() -> Qwen2_5OmniProcessor:
    return Qwen2_5OmniProcessor(
        Qwen2VLImageProcessor(**_PATCHES),
        Qwen2VLVideoProcessor(**_PATCHES),
        WhisperFeatureExtractor(feature_size=8, chunk_length=20),
        tiny_tokenizer(**TOKENS),
        chat_template=_TEMPLATE,
    )


def omni_model() -> Qwen2_5OmniThinkerForConditionalGeneration:
    ids = tiny_tokenizer(**TOKENS).convert_tokens_to_ids
    end = ids("<|im_end|>")
    config = Qwen2_5OmniThinkerConfig(
        text_config={
            "vocab_size": 320,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 8192,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [2, 3, 3],
            },
            "bos_token_id": None,
            "eos_token_id": end,
            "pad_token_id": ids("<|endoftext|>"),
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "out_hidden_size": 64,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 56,
            "fullatt_block_indexes": [1],
        },
        audio_config={
            "num_mel_bins": 8,
            "encoder_layers": 1,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 24,
            "d_model": 16,
            "max_source_positions": 50,
            "n_window": 20,
            "output_dim": 64,
        },
        image_token_index=ids(TOKENS["image_token"]),
        video_token_index=ids(TOKENS["video_token"]),
        audio_token_index=ids(TOKENS["audio_token"]),
        vision_start_token_id=ids(TOKENS["vision_bos_token"]),
        vision_end_token_id=ids(TOKENS["vision_eos_token"]),
        audio_start_token_id=ids(TOKENS["audio_bos_token"]),
        audio_end_token_id=ids(TOKENS["audio_eos_token"]),
        position_id_per_seconds=25,
        seconds_per_chunk=2,
    )
    torch.manual_seed(0)
    model = Qwen2_5OmniThinkerForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:  # far from uniform attention, so that evicting the wrong key shows
                weight.normal_(0, weight.shape[-1] ** -0.5 * (2.0 if "q_proj" in name else 1.0))
    model.generation_config.eos_token_id = end
    model.generation_config.pad_token_id = ids("<|endoftext|>")
    model.generation_config.suppress_tokens = [
        ids(TOKENS[name]) for name in ("image_token", "video_token", "audio_token")
    ]
    return model


def save_omni(directory: Path) -> Path:
    """A directory as released: a config of several models in one, the thinker's weights under its
    name. `AutoProcessor` loads its processor."""
    model = omni_model()
    model.save_pretrained(directory)
    omni_processor().save_pretrained(directory)
    weights = load_file(directory / "model.safetensors")
    named = {f"thinker.{name.removeprefix('thinker.')}": one for name, one in weights.items()}
    save_file(named, directory / "model.safetensors", metadata={"format": "pt"})
    parts = {"model_type": "qwen2_5_omni", "thinker_config": model.config.to_dict()}
    (directory / "config.json").write_text(json.dumps(parts))
    return directory
