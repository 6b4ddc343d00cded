"""Gemma 3: most layers slide over a window; the global ones are compressed."""

from typing import Any

from purekv.families.tiles import TileFamily


class Gemma3(TileFamily):
    name = "Gemma 3"
    model_types = ("gemma3",)
    checkpoints = ("google/gemma-3-4b-it", "google/gemma-3-12b-it")
    modalities = ("image",)
    attention = ("sdpa", "eager")
    sparse = False
    tested_on = ("tiny random models: image, images; sdpa, eager",)
    limits = (
        "sliding-window layers keep the model's own cache: no eviction before attention, no "
        "dropping, no first token on the compressed cache"
    )

    def tile_tokens(self, config: Any) -> int:
        return config.mm_tokens_per_image
