"""Which entries stay: the top visual ones of each head, and all that is protected."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Candidates:
    """Who competes for a place in the cache, and for how many places. Same for every layer."""

    evictable: Tensor
    """bool [B, S]; entries that compete."""
    protected: Tensor
    """bool [B, S]; entries that always stay. Entries in neither set are dropped."""
    quota: tuple[int, ...]
    """Evictable entries that stay in each row."""
    places: Tensor
    """int64 [B, 1, 1]; `quota` on the device."""
    padding: Tensor
    """int64 [B, 1, 1]; rows that keep fewer entries than the longest are padded on the left."""
    is_entry: Tensor | None
    """bool [B, width], False at that padding; None if there is none."""
    width: int
    """Entries stored per row."""

    @classmethod
    def build(cls, evictable: Tensor, protected: Tensor, quota: Sequence[int]) -> "Candidates":
        """Masks bool [B, S] on the CPU, disjoint; `quota` never above the row's evictable ones."""
        places = torch.tensor(list(quota))
        kept = places + protected.sum(-1)
        width = int(kept.max())
        padding = width - kept
        is_entry = torch.arange(width) >= padding[:, None] if padding.any() else None
        column = (slice(None), None, None)
        return cls(
            evictable, protected, tuple(quota), places[column], padding[column], is_entry, width
        )

    def to(self, device: torch.device) -> "Candidates":
        return replace(
            self,
            evictable=self.evictable.to(device),
            protected=self.protected.to(device),
            places=self.places.to(device),
            padding=self.padding.to(device),
            is_entry=None if self.is_entry is None else self.is_entry.to(device),
        )


@dataclass(frozen=True)
class Selection:
    """Cache entries kept by one layer, `width` a row."""

    index: Tensor
    """int64 [B, num_key_value_heads, width], ascending positions (0 where padded)."""
    is_entry: Tensor | None
    """bool [B, width], False at padding; None if no row is padded."""


def select(scores: Tensor, candidates: Candidates) -> Selection:
    """Keep the best evictable entries of each head, and all protected ones.

    Equal scores go to the earlier position. Nothing here waits for the device.

    Args:
        scores: float32, broadcastable to [B, num_key_value_heads, S], finite where evictable;
            higher is kept.
        candidates: on the same device.
    """
    batch, num_heads, seq_len = scores.shape
    competes = candidates.evictable[:, None]
    scores = scores.masked_fill(~competes, -torch.inf)
    threshold = _kth_largest(scores, candidates.quota)
    above = scores > threshold
    tied = (scores == threshold) & competes
    missing = candidates.places - above.sum(-1, keepdim=True)
    stays = above | (tied & (tied.cumsum(-1) <= missing)) | candidates.protected[:, None]

    # Each entry that stays moves to its rank; the others land in a spare column.
    rank = stays.cumsum(-1) - 1 + candidates.padding
    rank.masked_fill_(~stays, candidates.width)
    index = rank.new_zeros(batch, num_heads, candidates.width + 1)
    positions = torch.arange(seq_len, device=scores.device).expand_as(rank)
    index.scatter_(-1, rank, positions)
    return Selection(index[..., : candidates.width], candidates.is_entry)


def _kth_largest(scores: Tensor, quota: tuple[int, ...]) -> Tensor:
    """The `quota[b]`-th largest score of each row and head, [B, H, 1]; infinity for none."""
    seq_len = scores.shape[-1]

    def kth(rows: Tensor, count: int) -> Tensor:
        if count == 0:
            return rows.new_full((*rows.shape[:-1], 1), torch.inf)
        return rows.kthvalue(seq_len - count + 1, keepdim=True).values

    if len(set(quota)) == 1:
        return kth(scores, quota[0])
    return torch.cat([kth(scores[row : row + 1], count) for row, count in enumerate(quota)])
