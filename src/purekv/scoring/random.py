"""Random eviction: the floor that every method must clear."""

from dataclasses import dataclass

import torch
from torch import Tensor

from purekv.scoring.base import LayerInputs


@dataclass(frozen=True)
class Random:
    """Uniform scores from a generator seeded by the layer, the same on every device."""

    seed: int = 0

    def observes(self, layer_idx: int) -> bool:
        return False

    def observe(self, layer: LayerInputs) -> Tensor:
        raise NotImplementedError

    def score(self, layer: LayerInputs, observed: Tensor | None) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + layer.layer_idx)
        score = torch.rand(layer.value.shape[:3], generator=generator)
        return score.to(layer.value.device)
