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
    first_rank: Tensor
    """int64 [B, num_key_value_heads, 1]; added to the running count over all rows and heads of
    entries that stay, it gives the place of each in its row. Rows that keep fewer entries than the
    longest are padded on the left."""
    is_entry: Tensor | None
    """bool [B, width], False at that padding; None if there is none."""
    width: int
    """Entries stored per row."""

    @classmethod
    def build(
        cls, evictable: Tensor, protected: Tensor, quota: Sequence[int], num_heads: int
    ) -> "Candidates":
        """Masks bool [B, S] on the CPU, disjoint; `quota` never above the row's evictable ones;
        `num_heads` is the number of KV heads."""
        kept = torch.tensor(list(quota)) + protected.sum(-1)
        width = int(kept.max())
        padding = width - kept
        per_head = kept[:, None].expand(-1, num_heads)
        before = per_head.flatten().cumsum(0).view_as(per_head) - per_head
        first_rank = (padding[:, None] - before - 1)[..., None]
        is_entry = torch.arange(width) >= padding[:, None] if padding.any() else None
        return cls(evictable, protected, tuple(quota), first_rank, is_entry, width)

    def to(self, device: torch.device) -> "Candidates":
        return replace(
            self,
            evictable=self.evictable.to(device),
            protected=self.protected.to(device),
            first_rank=self.first_rank.to(device),
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
    keys = _unique_keys(scores).masked_fill_(~candidates.evictable[:, None], _NEVER)
    stays = (keys >= _kth_largest(keys, candidates.quota)) | candidates.protected[:, None]

    # Each entry that stays moves to its rank in its row; the others land in a spare column. One
    # scan over all rows is enough, because how many stay in each row is known beforehand.
    rank = stays.flatten().cumsum(0).view_as(stays) + candidates.first_rank
    rank.masked_fill_(~stays, candidates.width)
    index = rank.new_zeros(batch, num_heads, candidates.width + 1)
    positions = torch.arange(seq_len, device=scores.device).expand_as(rank)
    index.scatter_(-1, rank, positions)
    return Selection(index[..., : candidates.width], candidates.is_entry)


_NEVER = torch.iinfo(torch.int64).min


def _unique_keys(scores: Tensor) -> Tensor:
    """int64 keys in the order of float32 scores [B, H, S]; of equal scores the earlier wins."""
    bits = (scores + 0.0).contiguous().view(torch.int32)  # + 0.0: minus zero is zero
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    later = torch.arange(scores.shape[-1] - 1, -1, -1, device=scores.device)
    return (ordered.long() << 32) + later


def _kth_largest(keys: Tensor, quota: tuple[int, ...]) -> Tensor:
    """The `quota[b]`-th largest key of each row and head, [B, H, 1]; beyond all for none."""

    def kth(rows: Tensor, count: int) -> Tensor:
        if count == 0:
            return rows.new_full((*rows.shape[:-1], 1), torch.iinfo(torch.int64).max)
        return rows.topk(count, sorted=False).values.amin(-1, keepdim=True)

    if len(set(quota)) == 1:
        return kth(keys, quota[0])
    return torch.cat([kth(keys[row : row + 1], count) for row, count in enumerate(quota)])
