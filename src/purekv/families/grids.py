"""Families whose processors say how many patches each item has (`image_grid_thw`), as Qwen's do."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from purekv.errors import PureKVError
from purekv.families.base import Family, Grid, Placeholder, TokenRun, encoded_lengths, token_runs


class GridFamily(Family):
    """Patches of any resolution in time, height and width, merged in squares."""

    packed_tower = True

    def vision_tower(self, model: nn.Module) -> nn.Module | None:
        return self.multimodal_model(model).visual

    def visual_token_ids(self, config: Any) -> dict[str, int]:
        return {"image": config.image_token_id, "video": config.video_token_id}

    def tokens_of(self, config: Any, ids: Tensor) -> dict[str, Tensor]:
        """bool [B, S] of images and of videos."""
        return {"image": ids == config.image_token_id, "video": ids == config.video_token_id}

    def placeholders(self, config: Any, inputs: Mapping[str, Any]) -> list[Placeholder]:
        merge = config.vision_config.spatial_merge_size
        found = []
        for modality, is_here in self.tokens_of(config, inputs["input_ids"]).items():
            grid_thw, runs = inputs.get(f"{modality}_grid_thw"), token_runs(is_here)
            if grid_thw is None and not runs:
                continue
            if grid_thw is not None:
                grids = [(t, h // merge, w // merge) for t, h, w in grid_thw.tolist()]
            else:
                lengths = encoded_lengths(inputs, modality)
                grids = _grids_from_positions(inputs.get("position_ids"), is_here, runs, lengths)
            found.append(Placeholder(modality, runs, grids))
        return found


def _grids_from_positions(
    position_ids: Tensor | None,
    is_here: Tensor,
    runs: Sequence[TokenRun],
    lengths: Sequence[int] | None,
) -> list[Grid]:
    """Read the grids off the M-RoPE positions [3 or 4, B, S].

    Newer transformers encode pixels before the model runs and do not hand the grids on.

    Args:
        lengths: tokens of each item. None: each run is one.
    """
    if position_ids is None or position_ids.ndim != 3:
        raise PureKVError(
            "the prompt has visual tokens but no grid of their sizes; pass image_grid_thw or "
            "video_grid_thw as the processor made them"
        )
    places = position_ids[-2:].cpu()[:, is_here]  # [2, tokens], in reading order
    first_run = places.new_tensor([length for *_, length in runs]).cumsum(0).tolist()
    grids, start = [], 0
    for length in lengths if lengths is not None else [length for *_, length in runs]:
        # Frames stand apart where there is text between them; the first run has one at least.
        stop = min(start + length, next(end for end in first_run if end > start))
        item = places[:, start:stop]
        height, width = (item.amax(-1) - item.amin(-1) + 1).tolist()
        grids.append((length // (height * width), height, width))
        start += length
    return grids
