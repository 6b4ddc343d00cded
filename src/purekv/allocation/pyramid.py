"""PyramidKV (arXiv:2406.02069, section 3.2): much for the lower layers, little for the upper."""

from dataclasses import dataclass
from fractions import Fraction

from purekv.allocation.uniform import Uniform


@dataclass(frozen=True)
class Pyramid(Uniform):
    """Counts that fall linearly from layer to layer; the heads of a layer keep equally many.

    The last layer keeps a `steepness`-th of the mean, the first what makes up for it. Where that
    would be more than there is, the slope is flattened until the first layer keeps everything.
    Counts are rounded so that their total is exactly that of the uniform allocation.

    Where we differ: the quota is of visual entries, as text always stays, and the last layer
    keeps one at least. The paper scores as SnapKV does; here any scorer can.
    """

    steepness: int = 20

    def layer_quotas(self, quota: int, evictable: int, num_layers: int) -> list[int]:
        if quota == 0:
            return [0] * num_layers
        last = max(Fraction(quota, self.steepness), Fraction(2 * quota - evictable), Fraction(1))
        step = 2 * (quota - last) / max(1, num_layers - 1)
        ideal = [2 * quota - last - layer * step for layer in range(num_layers)]
        if num_layers == 1:
            ideal = [Fraction(quota)]
        counts = [int(count) for count in ideal]
        # What rounding down took goes to the largest remainders, of equal ones to the lower layer.
        order = sorted(range(num_layers), key=lambda layer: counts[layer] - ideal[layer])
        for layer in order[: num_layers * quota - sum(counts)]:
            counts[layer] += 1
        return counts
