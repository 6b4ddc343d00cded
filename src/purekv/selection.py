"""Which entries stay: the top visual ones, as the allocation has it, and all that is protected."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from purekv.allocation import Allocation
from purekv.ranking import NEVER, unique_keys


@dataclass(frozen=True)
class Selection:
    """Cache entries kept by one layer, equally many in each of its heads."""

    index: Tensor
    """int64 [B, num_key_value_heads, width], ascending positions (0 where padded)."""
    is_entry: Tensor | None
    """bool [B, width], False at padding; None if no row is padded. Rows that keep fewer entries
    than the longest are padded on the left."""

    def mask(self, seq_len: int) -> Tensor:
        """bool [B, num_key_value_heads, S]; which entries stay."""
        index = self.index
        if self.is_entry is not None:
            index = index.masked_fill(~self.is_entry[:, None], seq_len)
        stays = torch.zeros(*index.shape[:2], seq_len + 1, dtype=torch.bool, device=index.device)
        return stays.scatter_(-1, index, True)[..., :-1]


@dataclass(frozen=True)
class RaggedSelection:
    """Cache entries kept by one layer whose heads keep different numbers."""

    index: Tensor
    """int64 [entries]: numbers of entries in [B, num_key_value_heads, S], ascending."""
    length: Tensor
    """int64 [B, num_key_value_heads]: how many of them each head has."""
    entries_per_head: int
    """Mean over the heads of the row that has most."""

    def mask(self, seq_len: int) -> Tensor:
        """bool [B, num_key_value_heads, S]; which entries stay."""
        stays = torch.zeros(*self.length.shape, seq_len, dtype=torch.bool, device=self.index.device)
        stays.view(-1)[self.index] = True
        return stays


@dataclass(frozen=True)
class _Places:
    """Where what stays is stored, in layers with one quota. On the layer's device."""

    evictable: Tensor
    """bool [B, S]; entries that compete."""
    protected: Tensor
    """bool [B, S]; entries that always stay. Entries in neither set are dropped."""
    shift: Tensor
    """int64, broadcastable to [B, num_key_value_heads, 1]; added to the running count, over all
    rows and heads, of entries that stay, it gives the place of each."""
    is_entry: Tensor | None
    """As in `Selection`."""
    width: int
    """Entries per head of the longest row."""
    size: int
    """Places in all."""

    def to(self, device: torch.device) -> "_Places":
        return replace(
            self,
            evictable=self.evictable.to(device),
            protected=self.protected.to(device),
            shift=self.shift.to(device),
            is_entry=None if self.is_entry is None else self.is_entry.to(device),
        )


class Selector:
    """Chooses which entries of a prompt stay, layer after layer.

    Args:
        allocation: of the places.
        evictable: bool [B, S] on the CPU; entries that compete.
        protected: bool [B, S] on the CPU, disjoint; entries that always stay.
        quota: evictable entries that stay in each row, on average over layers and heads; never
            above the row's.
        num_layers: of the model.
        num_heads: KV heads of a layer.
    """

    def __init__(
        self,
        allocation: Allocation,
        evictable: Tensor,
        protected: Tensor,
        quota: Sequence[int],
        num_layers: int,
        num_heads: int,
    ) -> None:
        self._allocation = allocation
        self._evictable = evictable
        self._protected = protected
        self._num_heads = num_heads
        rows = zip(quota, evictable.sum(-1).tolist(), strict=True)
        quotas = [allocation.layer_quotas(count, most, num_layers) for count, most in rows]
        self.quotas: list[tuple[int, ...]] = list(zip(*quotas, strict=True))
        """Of each layer, for each row."""
        self._places: dict[tuple[tuple[int, ...], torch.device], _Places] = {}

    def select(self, layer_idx: int, scores: Tensor) -> Selection | RaggedSelection:
        """Keep the best evictable entries of a layer, and all protected ones.

        Equal scores go to the earlier position. Nothing here waits for the device.

        Args:
            scores: float32 [B, num_key_value_heads, S], finite where evictable; higher is kept.
        """
        quota = self.quotas[layer_idx]
        places = self._places_of(quota, scores.device)
        keys = unique_keys(scores).masked_fill_(~places.evictable[:, None], NEVER)
        stays = self._allocation.choose(keys, quota) | places.protected[:, None]

        # Each entry that stays moves to its place; the others land behind the last one. One scan
        # over all rows is enough, because how many stay in each row is known beforehand.
        position = torch.arange(scores.shape[-1], device=scores.device)
        place = stays.flatten().cumsum(0).view_as(stays) + places.shift
        place = torch.where(stays, place, places.size + position).flatten()
        index = place.new_zeros(places.size + len(position))
        if self._allocation.ragged:
            index.scatter_(0, place, torch.arange(len(place), device=place.device))
            return RaggedSelection(index[: places.size], stays.sum(-1), places.width)
        index.scatter_(0, place, position.expand_as(stays).flatten())
        index = index[: places.size].view(*stays.shape[:2], places.width)
        return Selection(index, places.is_entry)

    def _places_of(self, quota: tuple[int, ...], device: torch.device) -> _Places:
        key = quota, device
        if key not in self._places:
            self._places[key] = self._build(quota).to(device)
        return self._places[key]

    def _build(self, quota: tuple[int, ...]) -> _Places:
        kept = torch.tensor(quota) + self._protected.sum(-1)  # [B]
        width = int(kept.max())
        masks = self._evictable, self._protected
        if self._allocation.ragged:
            shift = torch.full((1, 1, 1), -1)
            return _Places(*masks, shift, None, width, self._num_heads * int(kept.sum()))
        padding = width - kept
        before = padding[:, None].repeat(1, self._num_heads).flatten().cumsum(0)
        shift = before.view(-1, self._num_heads, 1) - 1
        is_entry = torch.arange(width) >= padding[:, None] if padding.any() else None
        return _Places(*masks, shift, is_entry, width, len(kept) * self._num_heads * width)
