"""SmolVLM2: an image is rows of tiles and an overview; a frame of a video is an overview."""

from typing import Any

from torch import nn

from purekv.families.tiles import TileFamily


class SmolVLM(TileFamily):
    name = "SmolVLM2"
    model_types = ("smolvlm",)
    checkpoints = (
        "HuggingFaceTB/SmolVLM2-256M-Video-Instruct",
        "HuggingFaceTB/SmolVLM2-2.2B-Instruct",
    )
    limits = "consecutive images that are not cut count as frames of a video"

    def language_model(self, model: nn.Module) -> nn.Module:
        return self.multimodal_model(model).text_model

    def vision_tower(self, model: nn.Module) -> nn.Module | None:
        return self.multimodal_model(model).vision_model

    def tile_tokens(self, config: Any) -> int:
        side = config.vision_config.image_size // config.vision_config.patch_size
        return (side // config.scale_factor) ** 2
