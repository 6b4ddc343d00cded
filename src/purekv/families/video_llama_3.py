"""VideoLLaMA3: a time before each frame; tokens that repeat the frame before may be left out."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from purekv.families.base import Placeholder, encoded_lengths, token_runs
from purekv.families.grids import GridFamily


class VideoLlama3(GridFamily):
    name = "VideoLLaMA3"
    model_types = ("video_llama_3",)
    checkpoints = ("lkhl/VideoLLaMA3-2B-Image-HF", "lkhl/VideoLLaMA3-7B-Image-HF")
    limits = (
        "tiles of a sparse prefill are strips of a row; videos whose repeated tokens were left out "
        "stay dense"
    )

    def vision_tower(self, model: nn.Module) -> nn.Module | None:
        return self.multimodal_model(model).vision_model

    def placeholders(self, config: Any, inputs: Mapping[str, Any]) -> list[Placeholder]:
        # `generate` may have taken the grids, and positions do not tell: a run is an image or a
        # frame, of unknown height.
        found = []
        for modality, is_here in self.tokens_of(config, inputs["input_ids"]).items():
            runs = token_runs(is_here)
            tokens = [length for *_, length in runs]
            grids = [(1, 1, length) for length in tokens]
            lengths = _lengths(inputs, modality) if modality == "video" else None
            if lengths is not None and sum(lengths) == sum(tokens):
                grids = [(length // size, 1, size) for length, size in _frames(lengths, tokens)]
            found.append(Placeholder(modality, runs, grids))
        return found


def _lengths(inputs: Mapping[str, Any], modality: str) -> list[int] | None:
    """Tokens of each item, before any are left out."""
    grid_thw, merge = (inputs.get(f"{modality}_{name}") for name in ("grid_thw", "merge_sizes"))
    if grid_thw is None or merge is None:
        return encoded_lengths(inputs, modality)
    return (grid_thw.prod(-1) // merge.to(grid_thw.device) ** 2).tolist()


def _frames(lengths: list[int], runs: list[int]) -> list[tuple[int, int]]:
    """Each item's tokens, and its frames'."""
    starts = dict(zip([sum(runs[:n]) for n in range(len(runs))], runs, strict=True))
    return [(length, starts[sum(lengths[:n])]) for n, length in enumerate(lengths)]
