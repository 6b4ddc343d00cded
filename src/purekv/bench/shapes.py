"""Models at published shapes with random weights, and videos of random pixels for them.

Time and memory do not depend on what the weights say, so no checkpoint is needed to measure them.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, PreTrainedModel, Qwen2_5_VLConfig

from purekv.errors import PureKVError

VIDEO, IMAGE = 7, 8
SIDE = 16  # a frame is at most 16 x 16 visual tokens
QUESTION, BEFORE = 64, 16  # text tokens behind and before the video

_ROPE = {"rope_type": "default", "rope_theta": 1e6}
SHAPES: dict[str, dict[str, Any]] = {
    "qwen2.5-vl-7b": {
        "text_config": {
            "vocab_size": 152064,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {**_ROPE, "mrope_section": [16, 24, 24]},
        },
        "vision_config": {
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "out_hidden_size": 3584,
            "fullatt_block_indexes": [7, 15, 23, 31],
        },
    },
    "qwen2.5-vl-72b": {
        "text_config": {
            "vocab_size": 152064,
            "hidden_size": 8192,
            "intermediate_size": 29568,
            "num_hidden_layers": 80,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {**_ROPE, "mrope_section": [16, 24, 24]},
        },
        "vision_config": {
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3456,
            "num_heads": 16,
            "out_hidden_size": 8192,
            "fullatt_block_indexes": [7, 15, 23, 31],
        },
    },
    "tiny": {
        "text_config": {
            "vocab_size": 512,
            "bos_token_id": None,
            "eos_token_id": None,
            "hidden_size": 256,
            "intermediate_size": 512,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {**_ROPE, "mrope_section": [8, 12, 12]},
        },
        "vision_config": {
            "depth": 2,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 2,
            "out_hidden_size": 256,
            "fullatt_block_indexes": [1],
        },
    },
}


def shape_config(shape: str, num_hidden_layers: int | None = None) -> Qwen2_5_VLConfig:
    """The config of a model at that shape.

    `num_hidden_layers` gives the language model so many layers instead.

    Raises:
        PureKVError: an unknown shape; the message lists the known ones.
    """
    if shape not in SHAPES:
        raise PureKVError(f"shapes={shape!r} are unknown; use one of {', '.join(SHAPES)}")
    parts = dict(SHAPES[shape])
    if num_hidden_layers is not None:
        parts["text_config"] = {**parts["text_config"], "num_hidden_layers": num_hidden_layers}
    return Qwen2_5_VLConfig(
        **parts, image_token_id=IMAGE, video_token_id=VIDEO, tie_word_embeddings=False
    )


def random_model(
    shape: str, device: torch.device, dtype: torch.dtype, num_hidden_layers: int | None = None
) -> PreTrainedModel:
    """Weights of a scale at which activations neither vanish nor explode.

    `num_hidden_layers` as in `shape_config`.
    """
    config = shape_config(shape, num_hidden_layers)
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                weight.normal_(0, weight[0].numel() ** -0.5, generator=generator)
            else:
                weight.fill_(0.0 if name.endswith("bias") else 1.0)
    return model.to(device).eval()


def frame_grid(tokens: int) -> tuple[int, int]:
    """Frames of a video of about `tokens` visual tokens, and the side of a frame in tokens."""
    side = min(SIDE, max(1, round(tokens**0.5)))
    return max(1, round(tokens / side**2)), side


def random_inputs(config: Any, tokens: int) -> dict[str, Tensor]:
    """Arguments of the model's forward: text, a video of about `tokens` visual tokens, a question.

    On the CPU, float32. Pixels are random and repeat from frame to frame with some noise, as video
    does.
    """
    frames, side = frame_grid(tokens)
    visual = frames * side**2
    vision = config.vision_config
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(10, 500, (1, BEFORE + visual + QUESTION), generator=generator)
    ids[:, BEFORE : BEFORE + visual] = config.video_token_id
    height = side * vision.spatial_merge_size
    features = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    still = torch.randn(height**2, features, generator=generator)
    pixels = torch.randn(frames, height**2, features, generator=generator)
    return {
        "input_ids": ids,
        "mm_token_type_ids": (ids == config.video_token_id).int() * 2,
        "pixel_values_videos": pixels.mul_(0.6).add_(0.8 * still).flatten(0, 1),
        "video_grid_thw": torch.tensor([[frames, height, height]]),
        "second_per_grid_ts": torch.ones(1),
    }
