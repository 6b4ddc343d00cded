"""H2O (arXiv:2306.14048, section 4): keep the heavy hitters of accumulated attention."""

from dataclasses import dataclass

from torch import Tensor

from purekv.scoring.base import LayerInputs


@dataclass(frozen=True)
class H2O:
    """Attention that each entry received from every token of the prompt.

    Column sums of the whole causal prefill attention, averaged over the query heads of a KV group.
    Where we differ: the paper evicts while it decodes and keeps a share of recent tokens; here
    eviction follows the prefill, and all text is kept anyway.
    """

    def observes(self, layer_idx: int) -> bool:
        return False

    def observe(self, layer: LayerInputs) -> Tensor:
        raise NotImplementedError

    def score(self, layer: LayerInputs, observed: Tensor | None) -> Tensor:
        return layer.accumulated_attention.mean(2)
