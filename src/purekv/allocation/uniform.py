"""The same for everyone: every head of every layer keeps its own best entries."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from purekv.ranking import kth_largest


@dataclass(frozen=True)
class Uniform:
    """One quota for all layers and KV heads."""

    ragged = False

    def layer_quotas(self, quota: int, evictable: int, num_layers: int) -> list[int]:
        return [quota] * num_layers

    def choose(self, keys: Tensor, quota: Sequence[int]) -> Tensor:
        return keys >= kth_largest(keys, quota)
