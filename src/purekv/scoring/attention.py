"""Attention alone: CLIE without its value norm, as FastV (arXiv:2403.06764) ranks tokens."""

from dataclasses import dataclass

from torch import Tensor

from purekv.scoring.base import LayerInputs
from purekv.scoring.clie import CLIE


@dataclass(frozen=True)
class Attention(CLIE):
    """Mean attention that the window's queries pay at the source layer, over all query heads.

    What the value norm adds to CLIE is the difference between the two. With a window of one token,
    one source layer and `evict="drop"` it ranks as FastV does (section 4.1: the attention that the
    last token pays, after layer 2). Where we differ: the layers up to the source are evicted too,
    by their own attention.
    """

    def score(self, layer: LayerInputs, observed: Tensor | None) -> Tensor:
        assert observed is not None
        return observed.to(layer.value.device)
