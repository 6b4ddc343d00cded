"""Qwen2.5-Omni's thinker: sound is a medium beside images and videos, or woven into a video."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from purekv.families.base import Placeholder, token_runs
from purekv.families.grids import GridFamily


class Qwen25Omni(GridFamily):
    name = "Qwen2.5-Omni"
    model_types = ("qwen2_5_omni_thinker",)
    checkpoints = ("Qwen/Qwen2.5-Omni-3B", "Qwen/Qwen2.5-Omni-7B")
    modalities = ("image", "video", "audio")
    tested_on = (
        "tiny random models: image, images, video, mixed, audio; sdpa, eager",
        "purekv eval: sound woven into videos",
    )
    limits = "from Python, give PureKV the thinker of a whole model; sound is evictable like pixels"
    pixel_arguments = ("pixel_values", "pixel_values_videos", "input_features")

    def multimodal_model(self, model: nn.Module) -> nn.Module:
        # Older transformers have towers and decoder in one class; there `model` is the decoder.
        return model if hasattr(model, "visual") else model.model

    def language_model(self, model: nn.Module) -> nn.Module:
        multimodal = self.multimodal_model(model)
        return getattr(multimodal, "language_model", None) or multimodal.model

    def visual_token_ids(self, config: Any) -> dict[str, int]:
        return {
            "image": config.image_token_id,
            "video": config.video_token_id,
            "audio": _audio_token(config),
        }

    def placeholders(self, config: Any, inputs: Mapping[str, Any]) -> list[Placeholder]:
        runs = token_runs(inputs["input_ids"] == _audio_token(config))
        sounds = [(1, 1, length) for *_, length in runs]
        return [*super().placeholders(config, inputs), Placeholder("audio", runs, sounds)]


def _audio_token(config: Any) -> int:
    token = getattr(config, "audio_token_id", None)
    return config.audio_token_index if token is None else token
