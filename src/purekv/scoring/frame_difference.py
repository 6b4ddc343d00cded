"""Redundancy pruning before the language model: what a frame adds to the one before it."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from purekv.layout import Layout, media_of
from purekv.scoring.base import LayerInputs

FIRST_FRAME = 4.0
"""Above every difference, so that the first frame goes before all that follows."""


@dataclass(frozen=True)
class FrameDifference:
    """One minus the cosine between a visual embedding and that of its place a frame earlier.

    The first frame of a video stays as long as the budget allows, as in vLLM's efficient video
    sampling. What has no frame before it, an image, is compared with its left neighbour instead. No
    layer is asked and no question: tokens are dropped before the first layer (`evict="drop"`).
    """

    def score_embeddings(self, embeds: Tensor, layout: Layout) -> Tensor:
        """Importance, float32 [B, S], 0 at text; embeds are [B, S, hidden]."""
        score = torch.zeros(embeds.shape[:2], device=embeds.device)
        for row, spans in enumerate(layout.spans):
            for medium in media_of(spans):
                part = medium.positions(embeds.device)
                seen = F.normalize(embeds[row, part].float(), dim=-1).view(*medium.grid, -1)
                score[row, part] = _difference(seen).flatten()
        return score

    def observes(self, layer_idx: int) -> bool:
        return False

    def observe(self, layer: LayerInputs) -> Tensor:
        raise NotImplementedError

    def score(self, layer: LayerInputs, observed: Tensor | None) -> Tensor:
        raise NotImplementedError  # nothing is left to choose once layers run


def _difference(seen: Tensor) -> Tensor:
    """[T, H, W] from unit vectors [T, H, W, hidden]."""
    change = torch.full(seen.shape[:-1], FIRST_FRAME, device=seen.device)
    if seen.shape[0] > 1:
        change[1:] = 1 - (seen[1:] * seen[:-1]).sum(-1)
    else:
        change[:, :, 1:] = 1 - (seen[:, :, 1:] * seen[:, :, :-1]).sum(-1)
    return change
