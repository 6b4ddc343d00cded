"""StreamingLLM (arXiv:2309.17453, section 3.2), restricted to visual entries."""

from dataclasses import dataclass

import torch
from torch import Tensor

from purekv.scoring.base import LayerInputs


@dataclass(frozen=True)
class Streaming:
    """The first `num_sink` visual entries of the row, then its newest ones.

    Scores by place among the row's visual tokens and looks at nothing else. Where we differ:
    positions are not assigned anew inside the cache.
    """

    num_sink: int = 4

    def observes(self, layer_idx: int) -> bool:
        return False

    def observe(self, layer: LayerInputs) -> Tensor:
        raise NotImplementedError

    def score(self, layer: LayerInputs, observed: Tensor | None) -> Tensor:
        is_visual = layer.layout.is_visual
        place = is_visual.cumsum(-1)  # [B, S], from 1 at the first visual token
        above_all = is_visual.shape[-1] + 1
        return torch.where(place <= self.num_sink, above_all, place).float()[:, None]
