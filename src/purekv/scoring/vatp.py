"""VATP (arXiv:2406.12335): accumulated attention times the size of the value."""

from dataclasses import dataclass

import torch
from torch import Tensor

from purekv.scoring.base import LayerInputs


@dataclass(frozen=True)
class VATP:
    """H2O's accumulated attention, weighted by the L1 norm of each value vector ("H2O w/ VATP").

    The paper always keeps the first tokens, where attention sinks with short values are; here
    these are text, which is kept anyway.
    """

    def observes(self, layer_idx: int) -> bool:
        return False

    def observe(self, layer: LayerInputs) -> Tensor:
        raise NotImplementedError

    def score(self, layer: LayerInputs, observed: Tensor | None) -> Tensor:
        norm = torch.linalg.vector_norm(layer.value, ord=1, dim=-1, dtype=torch.float32)
        return layer.accumulated_attention.mean(2) * norm
