"""LLaVA-OneVision."""

from typing import Any

from purekv.families.llava import LlavaFamily


class LlavaOneVision(LlavaFamily):
    name = "LLaVA-OneVision"
    model_types = ("llava_onevision",)
    checkpoints = (
        "llava-hf/llava-onevision-qwen2-0.5b-ov-hf",
        "llava-hf/llava-onevision-qwen2-7b-ov-hf",
    )
    newline = True

    def frame_side(self, config: Any) -> int:
        side = config.vision_config.image_size // config.vision_config.patch_size
        return -(-side // 2)  # bilinear to half, rounded up
