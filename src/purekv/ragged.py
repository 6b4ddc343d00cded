"""A cache layer whose heads keep different numbers of the prompt's entries, at no byte more."""

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from purekv.cache import EvictingLayer
from purekv.ops.ragged_decode import Segments
from purekv.selection import RaggedSelection


class RaggedLayer(EvictingLayer):
    """An evicting layer that stores what its prompt left flat, head after head.

    What comes later is stored as ever, in `keys` and `values`. `update` answers a padded view of
    both, as wide as the longest head, which lives while the layer attends; `is_entry` says, for
    each head, what of it is real. Where a kernel takes `segments`, no such view is made for a
    single token, and `update` answers the later entries only. Reordering rows does not move the
    flat entries: rows point to them.
    """

    def __init__(self) -> None:
        super().__init__()
        self._flat: tuple[Tensor, Tensor] | None = None
        """Keys and values, [entries, D] each. None until the layer evicts."""
        self._start: Tensor
        """int64 [B, num_key_value_heads]; where the entries of each head begin."""
        self._length: Tensor
        """int64 [B, num_key_value_heads]."""
        self._mean = 0
        """Entries per head of the row that has most of them."""
        self._width: int | None = None
        """Entries of the longest head; None while only the device knows."""
        self.segmented = False
        """Whether who attends takes `segments` for a single token. Set before each forward."""

    @property
    def width(self) -> int:
        """Entries of the prompt in the longest head. Waits for the device once; see `settle`."""
        if self._width is None:
            settle([self])
        assert self._width is not None
        return self._width

    @property
    def physical_length(self) -> int:
        """Entries that attention meets in each head, padding included."""
        return self.dense_length + (0 if self._flat is None else self.width)

    @property
    def entries_per_head(self) -> int:
        return self.dense_length + self._mean

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        if self._flat is None:
            return super().tensors
        return (*super().tensors, *self._flat, self._start, self._length)

    @property
    def is_entry(self) -> Tensor | None:
        """bool [B, num_key_value_heads, physical length]; [B, physical length] or None before."""
        later = self._dense_entries()
        if self._flat is None:
            return later
        prompt = torch.arange(self.width, device=self._length.device) < self._length[..., None]
        if later is None:
            return torch.nn.functional.pad(prompt, (0, self.dense_length), value=True)
        return torch.cat([prompt, later[:, None].expand(-1, prompt.shape[1], -1)], dim=-1)

    def lends_segments(self, new: int) -> bool:
        """Whether that many new tokens attend to `segments`."""
        return self.segmented and new == 1 and self._flat is not None

    @property
    def segments(self) -> Segments:
        """Where the entries of each head are."""
        assert self._flat is not None
        return Segments(
            *self._flat, self._start, self._length, self.width,
            self.keys, self.values, self._dense_entries(),
        )  # fmt: skip

    @property
    def entries_key(self) -> Hashable:
        return super().entries_key if self._flat is None else id(self)

    @property
    def maskable(self) -> bool:
        return self._flat is None and super().maskable

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        later = super().update(key_states, value_states, *args, **kwargs)
        if self._flat is None or self.lends_segments(key_states.shape[-2]):
            return later
        index = self._start[..., None] + torch.arange(self.width, device=self._start.device)
        index = index.clamp_(max=len(self._flat[0]) - 1)  # behind the last head there is nothing
        keys, values = (
            torch.cat([flat[index], new], dim=2)
            for flat, new in zip(self._flat, later, strict=True)
        )
        return keys, values

    def evict(self, key: Tensor, value: Tensor, selection: Any, seen: int) -> None:
        """As `EvictingLayer.evict`, by a `RaggedSelection`."""
        assert isinstance(selection, RaggedSelection)
        self._flat = key.flatten(0, 2)[selection.index], value.flatten(0, 2)[selection.index]
        self._length = selection.length
        ends = self._length.flatten().cumsum(0).view_as(self._length)
        self._start = ends - self._length
        self._mean = selection.entries_per_head
        self._width = None
        self.keys, self.values = (x.new_empty(*x.shape[:2], 0, x.shape[-1]) for x in (key, value))
        self._is_entry = self._buffers = None
        self._evicted = seen

    def reset(self) -> None:
        super().reset()
        self._flat, self._mean, self._width = None, 0, None

    def _forget_newest(self, count: int) -> None:
        later = min(count, self.dense_length)
        if later:
            super()._forget_newest(later)
        count -= later
        if count and self._flat is not None:  # the end of the prompt: text, kept by all heads
            self._length = (self._length - count).clamp(min=0)
            self._width = None if self._width is None else max(0, self._width - count)
            self._mean = max(0, self._mean - count)
            self._evicted -= count

    def _take_rows(self, rows: Tensor) -> None:
        super()._take_rows(rows)
        if self._flat is not None:
            self._start, self._length = self._start[rows], self._length[rows]


def settle(layers: Sequence[Any]) -> None:
    """Learn the widths of a prompt's ragged layers. Waits for the device once."""
    ragged = [layer for layer in layers if isinstance(layer, RaggedLayer)]
    new = [layer for layer in ragged if layer._flat is not None and layer._width is None]
    if new:
        longest = [layer._length.amax().to(new[0]._length.device) for layer in new]
        for layer, width in zip(new, torch.stack(longest).tolist(), strict=True):
            layer._width = width
