"""InternVL: tiles of an image in one run, frames of a video with text between them."""

from typing import Any

from purekv.families.tiles import TileFamily


class InternVL(TileFamily):
    name = "InternVL"
    model_types = ("internvl",)
    checkpoints = ("OpenGVLab/InternVL3-1B-hf", "OpenGVLab/InternVL3_5-8B-HF")
    limits = "consecutive small images count as frames of a video"

    def tile_tokens(self, config: Any) -> int:
        return config.image_seq_length
