"""Families that cut images into square tiles, each of the same number of tokens."""

from collections.abc import Mapping
from itertools import pairwise
from math import isqrt
from typing import Any

import torch
from torch import Tensor

from purekv.families.base import Family, Placeholder, token_runs

MOST_TEXT = 24
"""Most tokens between two frames of one video."""
LINE_END = 4
"""Most tokens between the last tile of an image and the overview behind it."""


class TileFamily(Family):
    """Tiles of images and frames of videos look alike: one placeholder stands for both.

    What is taken for a video: two or more runs of one tile each, behind the same opening token, and
    with little text between them. Several small images in a row look the same and are read as one.
    """

    pixel_arguments = ("pixel_values",)

    def tile_tokens(self, config: Any) -> int:
        """Tokens of a tile; a square number."""
        raise NotImplementedError

    def placeholders(self, config: Any, inputs: Mapping[str, Any]) -> list[Placeholder]:
        ids, tile = inputs["input_ids"], self.tile_tokens(config)
        side, is_here = isqrt(tile), ids == config.image_token_id
        videos = _videos(ids, is_here, tile) if "video" in self.modalities else []
        is_video = torch.zeros_like(is_here)
        for row, starts in videos:
            for start in starts:
                is_video[row, start : start + tile] = True
        is_image = is_here & ~is_video
        images = [(1, side, side)] * (int(is_image.sum()) // tile)
        frames = [(len(starts), side, side) for _, starts in videos]
        return [
            Placeholder("image", token_runs(is_image), images),
            Placeholder("video", token_runs(is_video), frames),
        ]


def _videos(ids: Tensor, is_here: Tensor, tile: int) -> list[tuple[int, list[int]]]:
    """Row and first positions of the frames of each video."""
    runs = [run for run in token_runs(is_here) if run[2] == tile and run[1]]
    chains = [runs[:1]]
    for (row, start, _), run in pairwise(runs):
        text = run[1] - start - tile
        alike = ids[row, start - 1] == ids[run[0], run[1] - 1]
        whole = is_here[row, start : run[1]].sum() == tile  # nothing larger in between
        if run[0] == row and text <= MOST_TEXT and alike and whole:
            chains[-1].append(run)
        else:
            chains.append([run][run[0] == row and text <= LINE_END and not alike :])
    return [(chain[0][0], [run[1] for run in chain]) for chain in chains if len(chain) > 1]
