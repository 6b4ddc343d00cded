"""AdaKV (arXiv:2407.11550, algorithms 1 and 2): heads of a layer share one budget."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from purekv.allocation.uniform import Uniform
from purekv.ranking import NEVER, kth_largest


@dataclass(frozen=True)
class Ada(Uniform):
    """The best entries of all heads of a layer together, whichever head they are of.

    So that no head is left with next to nothing, each first keeps its own best `safeguard *
    quota`; the rest of the layer's places go to the largest scores left, over all heads. Scores
    must then mean the same in every head; where they are equal, the earlier position wins.

    Where we differ: the paper blends a head's share with the uniform one, which has to be rounded
    and may miss the total; a floor of the same size keeps it exact. Heads are KV heads, as the
    cache stores them.
    """

    safeguard: float = 0.2
    """Share of the quota that every head keeps."""

    ragged = True

    def choose(self, keys: Tensor, quota: Sequence[int]) -> Tensor:
        num_heads = keys.shape[1]
        floors = [int(self.safeguard * count + 1e-6) for count in quota]
        safe = keys >= kth_largest(keys, floors)
        rest = keys.masked_fill(safe, NEVER).flatten(1)  # [B, H * S]
        shared = [num_heads * (count - floor) for count, floor in zip(quota, floors, strict=True)]
        return safe | (keys >= kth_largest(rest, shared)[..., None])
