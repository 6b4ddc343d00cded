"""A calibrated budget for each layer, on top of another allocation."""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from torch import Tensor

from purekv.allocation.base import Allocation


@dataclass(frozen=True)
class LayerShares:
    """Each layer's part of the budget is given; `inner` spreads it over the heads of a layer.

    What a layer cannot use, as it has no more entries, goes to the others in proportion. Counts are
    rounded so that their total is exactly that of the uniform allocation.
    """

    inner: Allocation
    shares: tuple[float, ...]
    """Of each layer, up to a common factor; 0: its cache keeps no visual token at all."""

    @property
    def ragged(self) -> bool:
        return self.inner.ragged

    def layer_quotas(self, quota: int, evictable: int, num_layers: int) -> list[int]:
        shares = [Fraction(share) for share in self.shares]
        total = quota * num_layers
        ideal: list[Fraction] = [Fraction(0)] * num_layers
        open_layers = [layer for layer in range(num_layers) if shares[layer] > 0]
        while open_layers:
            left = total - sum(ideal)
            scale = Fraction(left) / sum((shares[layer] for layer in open_layers), Fraction(0))
            full = [layer for layer in open_layers if scale * shares[layer] >= evictable]
            for layer in full or open_layers:
                ideal[layer] = min(Fraction(evictable), scale * shares[layer])
            open_layers = [layer for layer in open_layers if full and layer not in full]
        counts = [int(count) for count in ideal]
        # What rounding down took goes to the largest remainders, of equal ones to the lower layer.
        order = sorted(range(num_layers), key=lambda layer: counts[layer] - ideal[layer])
        spare = total - sum(counts)
        room = [layer for layer in order if shares[layer] > 0 and counts[layer] < evictable]
        for layer in room[:spare]:
            counts[layer] += 1
        return counts

    def choose(self, keys: Tensor, quota: Sequence[int]) -> Tensor:
        return self.inner.choose(keys, quota)
