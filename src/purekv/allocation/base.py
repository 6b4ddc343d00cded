"""What an allocation decides."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class Allocation(Protocol):
    """Spreads a budget over layers, and over the heads of a layer. Holds hyperparameters only."""

    @property
    def ragged(self) -> bool:
        """Whether the heads of a layer may keep different numbers of entries."""
        ...

    def layer_quotas(self, quota: int, evictable: int, num_layers: int) -> list[int]:
        """Entries that a KV head keeps in each layer, on average over the layer's heads.

        Args:
            quota: their mean over the layers, at most `evictable`.
            evictable: entries that compete in the row.
        """
        ...

    def choose(self, keys: Tensor, quota: Sequence[int]) -> Tensor:
        """Which entries of a layer stay: bool [B, num_key_value_heads, S].

        Args:
            keys: int64 [B, num_key_value_heads, S], see `purekv.ranking.unique_keys`; `NEVER` at
                entries that do not compete.
            quota: of this layer, for each row; `num_key_value_heads` times as many stay in all.
        """
        ...
