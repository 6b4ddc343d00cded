"""Models at published shapes with random weights: their language model is timed, pixels are not."""

from typing import Any

import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

QWEN25_VL_7B: dict[str, Any] = {
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e6,
        "mrope_section": [16, 24, 24],
    },
}
TINY: dict[str, Any] = {
    **QWEN25_VL_7B,
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e6,
        "mrope_section": [8, 12, 12],
    },
}
SHAPES = {"qwen2.5-vl-7b": QWEN25_VL_7B, "tiny": TINY}
VIDEO, IMAGE = 7, 8


def random_model(shape: str, device: str) -> Qwen2_5_VLForConditionalGeneration:
    """bf16, weights of a scale at which activations neither vanish nor explode."""
    text = SHAPES[shape]
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config={"depth": 1, "hidden_size": 64, "num_heads": 2, "intermediate_size": 64,
                       "out_hidden_size": text["hidden_size"]},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(config)
    model = model.to(torch.bfloat16).to_empty(device=device).eval()
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                weight.normal_(0, weight.shape[-1] ** -0.5, generator=generator)
            elif "norm" in name:
                weight.fill_(1.0)
            else:
                weight.zero_()
        rotary = model.model.language_model.rotary_emb
        rotary.inv_freq, _ = rotary.compute_default_rope_parameters(config.text_config)
        rotary.inv_freq = rotary.inv_freq.to(device)
        rotary.original_inv_freq = rotary.inv_freq.clone()
    return model


def video_prompt(
    model: Qwen2_5_VLForConditionalGeneration,
    frames: int,
    side: int = 16,
    question: int = 64,
    batch: int = 1,
) -> dict[str, torch.Tensor]:
    """Arguments for the multimodal model: `frames` x `side` x `side` visual tokens, then text.

    Visual embeddings are random and repeat from frame to frame with some noise, as video does.
    """
    config, device = model.config, model.device
    visual = frames * side * side
    ids = torch.randint(10, 500, (batch, 16 + visual + question))
    ids[:, 16 : 16 + visual] = VIDEO
    merge = config.vision_config.spatial_merge_size
    grid = torch.tensor([[frames, side * merge, side * merge]] * batch)
    kinds = (ids == VIDEO).int() * 2
    position_ids, _ = model.model.get_rope_index(
        ids, mm_token_type_ids=kinds, video_grid_thw=grid, second_per_grid_ts=torch.ones(batch)
    )
    hidden = config.text_config.hidden_size
    generator = torch.Generator(device).manual_seed(1)
    embeds = torch.randn(batch, ids.shape[1], hidden, device=device, generator=generator)
    still = torch.randn(batch, 1, side * side, hidden, device=device, generator=generator)
    video = embeds[:, 16 : 16 + visual].view(batch, frames, side * side, hidden)
    video.mul_(0.6).add_(0.8 * still)
    return {
        "input_ids": ids.to(device),
        "inputs_embeds": embeds.to(torch.bfloat16),
        "position_ids": position_ids.to(device),
        "video_grid_thw": grid,
    }
