"""Qwen2.5-VL."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from purekv.errors import PureKVError
from purekv.families.base import Family, Placeholder, token_runs

Grid = tuple[int, int, int]


class Qwen25VL(Family):
    model_types = ("qwen2_5_vl",)
    checkpoints = ("Qwen/Qwen2.5-VL-3B-Instruct", "Qwen/Qwen2.5-VL-7B-Instruct")
    pixel_arguments = ("pixel_values", "pixel_values_videos")

    def multimodal_model(self, model: nn.Module) -> nn.Module:
        return getattr(model, "model", model)

    def language_model(self, model: nn.Module) -> nn.Module:
        return self.multimodal_model(model).language_model

    def vision_tower(self, model: nn.Module) -> nn.Module:
        return self.multimodal_model(model).visual

    def visual_token_ids(self, config: Any) -> dict[str, int]:
        return {"image": config.image_token_id, "video": config.video_token_id}

    def placeholders(self, config: Any, inputs: Mapping[str, Any]) -> list[Placeholder]:
        merge = config.vision_config.spatial_merge_size
        found = []
        for modality, token_id in self.visual_token_ids(config).items():
            grid_thw = inputs.get(f"{modality}_grid_thw")
            if grid_thw is not None:
                grids = [(t, h // merge, w // merge) for t, h, w in grid_thw.tolist()]
            else:
                grids = _grids_from_positions(inputs, token_id)
            found.append(Placeholder(modality, token_id, grids))
        return found


def _grids_from_positions(inputs: Mapping[str, Any], token_id: int) -> list[Grid]:
    """Read the grids off the M-RoPE positions [3 or 4, B, S].

    Newer transformers encode pixels before the model runs and do not hand the grids on.
    """
    runs = token_runs(inputs["input_ids"], token_id)
    if not runs:
        return []
    position_ids: Tensor | None = inputs.get("position_ids")
    if position_ids is None or position_ids.ndim != 3:
        raise PureKVError(
            "the prompt has visual tokens but no grid of their sizes; pass image_grid_thw or "
            "video_grid_thw as the processor made them"
        )
    height_width = position_ids[-2:].cpu()
    grids = []
    for row, start, length in runs:
        positions = height_width[:, row, start : start + length]
        height, width = (positions.amax(-1) - positions.amin(-1) + 1).tolist()
        grids.append((length // (height * width), height, width))
    return grids
