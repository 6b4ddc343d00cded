"""Value norm only: the attention-free half of CLIE."""

from dataclasses import dataclass

from torch import Tensor

from purekv.scoring.base import LayerInputs


@dataclass(frozen=True)
class ValueNorm:
    """Favour entries with long value vectors; looks at no query."""

    def observes(self, layer_idx: int) -> bool:
        return False

    def observe(self, layer: LayerInputs) -> Tensor:
        raise NotImplementedError

    def score(self, layer: LayerInputs, observed: Tensor | None) -> Tensor:
        return layer.value_norm
