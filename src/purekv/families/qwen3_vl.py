"""Qwen3-VL: time stamps between frames; features of the tower's depth enter the first layers."""

from typing import Any

from purekv.families.grids import GridFamily


class Qwen3VL(GridFamily):
    name = "Qwen3-VL"
    model_types = ("qwen3_vl",)
    checkpoints = ("Qwen/Qwen3-VL-2B-Instruct", "Qwen/Qwen3-VL-8B-Instruct")
    limits = 'evict="drop" only from the last layer that gets deepstack features on'
    full_length_arguments = ("visual_pos_masks", "deepstack_visual_embeds")

    def undroppable_layers(self, config: Any) -> int:
        return len(config.vision_config.deepstack_visual_indexes)
