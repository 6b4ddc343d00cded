"""LLaVA-NeXT-Video."""

from typing import Any

from purekv.families.llava import LlavaFamily


class LlavaNextVideo(LlavaFamily):
    name = "LLaVA-NeXT-Video"
    model_types = ("llava_next_video",)
    checkpoints = ("llava-hf/LLaVA-NeXT-Video-7B-hf",)

    def frame_side(self, config: Any) -> int:
        side = config.vision_config.image_size // config.vision_config.patch_size
        return side // config.spatial_pool_stride
