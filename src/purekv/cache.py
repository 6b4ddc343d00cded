"""A cache layer that forgets: fewer entries than tokens seen, and the bytes really freed."""

from collections.abc import Collection, Hashable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from purekv.errors import PureKVError
from purekv.selection import Selection

ROOM = 128
"""Entries that a layer makes room for at once when tokens come one by one. The stored ones are
copied to get there, so a step costs 1/128 of the copy that transformers makes at each."""


class EvictingLayer(DynamicLayer):
    """A dynamic layer whose *logical* length (tokens seen) may exceed its *physical* one.

    `generate` slices inputs by the logical length and positions go on from it, so a compressed
    cache continues like the full one. Rows that kept fewer entries are padded.

    What the prompt leaves takes no byte more than it needs. From the first token that comes alone,
    `keys` and `values` are views of buffers with room behind them, written in place: the layer
    owns them, so a view lent to attention holds until the next update.
    """

    def __init__(self) -> None:
        super().__init__()
        self._buffers: tuple[Tensor, Tensor] | None = None
        """[B, num_key_value_heads, room included, D] each; None until there is room."""
        self._evicted = 0
        """Tokens seen that `keys` does not hold, padding counted as the batch counts it."""
        self.prompt_entries = 0
        """Of the physical length, those that eviction left of a prompt; later ones are stored one
        for one."""
        self.trailing_text = 0
        """Newest tokens of the prompt that every row keeps: nothing behind them was evicted."""
        self._is_entry: Tensor | None = None
        self.masked_elsewhere = False
        """Whether masks that transformers makes for it are not used."""

    @property
    def dense_length(self) -> int:
        """Entries in `keys`."""
        return super().get_seq_length()

    @property
    def physical_length(self) -> int:
        """Entries that attention meets in each head, padding included."""
        return self.dense_length

    @property
    def entries_per_head(self) -> int:
        """Entries stored for a head of the longest row, on average over its heads."""
        return self.dense_length

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """All that the layer stores of its tokens."""
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Logical length: tokens seen, padding included."""
        return self.dense_length + self._evicted

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Entries and the position of the first, for a mask that transformers builds.

        Within a PureKV block masks are ours, and whoever asks is not listened to.

        Raises:
            PureKVError: such a mask would be wrong here.
        """
        if self._evicted and not self.maskable and not self.masked_elsewhere:
            raise PureKVError(
                "rows or heads of this cache keep different numbers of entries, which only "
                "PureKV can mask; go on with it inside a PureKV block"
            )
        return self.dense_length + query_length, self._evicted

    @property
    def evicted(self) -> bool:
        """Whether anything was forgotten."""
        return self._evicted > 0

    @property
    def maskable(self) -> bool:
        """Whether causality is all that a mask has to see to."""
        return self._is_entry is None

    @property
    def is_entry(self) -> Tensor | None:
        """bool [B, physical length], False at padding; None if there is no padding."""
        return self._dense_entries()

    @property
    def entries_key(self) -> Hashable:
        """Equal for two layers of a cache if their `is_entry` is."""
        return id(self._is_entry), self.dense_length

    def _dense_entries(self) -> Tensor | None:
        """bool [B, dense length], or None: what of `keys` is not padding."""
        if self._is_entry is None:
            return None
        missing = self.dense_length - self._is_entry.shape[1]
        return torch.nn.functional.pad(self._is_entry, (0, missing), value=True)

    def mark_padding(self, is_token: Tensor) -> None:
        """Say which of the newest entries are padding: bool [B, entries], False at padding."""
        is_token = is_token.to(self.keys.device)
        entries = self.dense_length - is_token.shape[1]
        before = self._dense_entries()
        if before is None:
            before = is_token.new_ones(is_token.shape[0], entries)
        self._is_entry = torch.cat([before[:, :entries], is_token], dim=1)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store entries [B, num_key_value_heads, n, D]; answers all of them, without a copy."""
        if not self.is_initialized or self.keys.ndim == 1:
            return super().update(key_states, value_states, *args, **kwargs)
        new = key_states.shape[-2]
        if new > 1 and self._buffers is None:
            return super().update(key_states, value_states, *args, **kwargs)
        start, stop = self.dense_length, self.dense_length + new
        if not self._writable(stop):
            room = start + max(new, ROOM)
            self._buffers = _roomy(self.keys, room), _roomy(self.values, room)
        assert self._buffers is not None
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer.narrow(2, start, new).copy_(states)
        self._show(stop)
        return self.keys, self.values

    def _writable(self, length: int) -> bool:
        """Whether the buffers take entries up to that length."""
        if self._buffers is None or length > self._buffers[0].shape[-2]:
            return False
        return torch.is_inference_mode_enabled() or not self._buffers[0].is_inference()

    def _show(self, length: int) -> None:
        assert self._buffers is not None
        keys, values = self._buffers
        self.keys, self.values = keys.narrow(2, 0, length), values.narrow(2, 0, length)

    def evict(self, key: Tensor, value: Tensor, selection: Selection, seen: int) -> None:
        """Replace the stored entries by a selection of `key` and `value`.

        Args:
            key, value: [B, num_key_value_heads, S, D], all entries of this layer.
            selection: those that stay.
            seen: the logical length afterwards.
        """
        index = selection.index[..., None].expand(-1, -1, -1, key.shape[-1])
        self.keys = key.gather(2, index)
        self.values = value.gather(2, index[..., :1].expand(-1, -1, -1, value.shape[-1]))
        self._buffers = None
        self._is_entry = selection.is_entry
        self.prompt_entries = self.physical_length
        self._evicted = seen - self.physical_length

    def reset(self) -> None:
        self._evicted = self.prompt_entries = self.trailing_text = 0
        self._is_entry = self._buffers = None
        self.keys = self.values = None
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens: a negative count, or the logical length to go back to."""
        remove = -tokens_to_remove
        if tokens_to_remove > 0:
            remove = max(0, self.get_seq_length() - tokens_to_remove)
        whole = self.physical_length - self.prompt_entries + self.trailing_text
        if self._evicted and remove > whole:
            raise PureKVError(
                f"cannot forget the newest {remove} tokens: of those before the last {whole}, some "
                "were evicted; start the prompt again"
            )
        if remove:
            self._forget_newest(remove)
            self.trailing_text = min(self.trailing_text, whole - remove)
            self.prompt_entries = min(self.prompt_entries, self.physical_length)

    def _forget_newest(self, count: int) -> None:
        entries = self._dense_entries()
        self._is_entry = None if entries is None else entries[:, :-count]
        self.keys = self.keys[..., :-count, :]
        self.values = self.values[..., :-count, :]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.get_seq_length():
            self._take_rows(beam_idx.to(self.keys.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.get_seq_length():
            rows = torch.arange(self.keys.shape[0], device=self.keys.device)
            self._take_rows(rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.get_seq_length():
            self._take_rows(torch.arange(self.keys.shape[0], device=self.keys.device)[indices])

    def _take_rows(self, rows: Tensor) -> None:
        """Go on with these rows, int64 [new batch]."""
        if self._buffers is None:
            self.keys, self.values = self.keys[rows], self.values[rows]
        else:
            length = self.keys.shape[-2]
            self._buffers = self._buffers[0][rows], self._buffers[1][rows]
            self._show(length)
        if self._is_entry is not None:
            self._is_entry = self._is_entry[rows]


def _roomy(stored: Tensor, room: int) -> Tensor:
    """A copy of [B, H, n, D] at the beginning of [B, H, room, D]."""
    buffer = stored.new_empty(*stored.shape[:-2], room, stored.shape[-1])
    buffer.narrow(2, 0, stored.shape[2]).copy_(stored)
    return buffer


def is_compressed(cache: Cache) -> bool:
    """Whether the cache was filled by a PureKV run."""
    return any(isinstance(layer, EvictingLayer) for layer in cache.layers)


def own_masks(cache: Cache, ours: bool) -> None:
    """Say whether masks that transformers makes for the cache's evicting layers are not used."""
    for layer in cache.layers:
        if isinstance(layer, EvictingLayer):
            layer.masked_elsewhere = ours


def entries_per_head(layer: Any) -> int:
    """Entries stored for a head by a layer of any kind; see `EvictingLayer`."""
    return layer.entries_per_head if isinstance(layer, EvictingLayer) else layer.keys.shape[2]


def physical_length(layer: Any) -> int:
    """Entries that attention meets in a layer of any kind."""
    return layer.physical_length if isinstance(layer, EvictingLayer) else layer.keys.shape[2]


def make_evicting(
    cache: Cache,
    num_layers: int,
    layer_class: type[EvictingLayer] = EvictingLayer,
    layers: Collection[int] | None = None,
) -> None:
    """Turn an empty `DynamicCache` into one that can evict, with layers of that class.

    `layers`: numbers of those that evict; the others, which slide, are left alone. None: all.

    Raises:
        PureKVError: the cache is of another kind (static, quantized, sliding ...).
    """
    evicting = range(num_layers) if layers is None else layers
    supported = all(
        type(layer) is DynamicLayer
        or isinstance(layer, EvictingLayer)
        or (type(layer) is DynamicSlidingWindowLayer and idx not in evicting)
        for idx, layer in enumerate(cache.layers)
    )
    lazy = cache.layer_class_to_replicate in (None, DynamicLayer)
    if not supported or not lazy or cache.offloading:
        kinds = sorted({type(layer).__name__ for layer in cache.layers})
        raise PureKVError(
            f"{type(cache).__name__} ({', '.join(kinds) or 'offloading'}) cannot be compressed; "
            "use a DynamicCache, which generate makes by default (no cache_implementation)"
        )
    cache.layer_class_to_replicate = None
    if len(evicting) == num_layers:
        cache.layers = [layer_class() for _ in evicting]
    elif len(cache.layers) == num_layers:
        for idx in evicting:
            cache.layers[idx] = layer_class()
    else:
        raise PureKVError(
            "the cache does not know of the model's sliding-window layers; make it with "
            "DynamicCache(config=model.config)"
        )


def cache_bytes(cache: Cache) -> int:
    """Bytes that the cache's tensors hold allocated, padding and room for more included."""
    storages = (tensor.untyped_storage() for tensor in _tensors(cache))
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def entry_bytes(cache: Cache) -> int:
    """The same without the room that layers made for tokens to come."""
    return sum(tensor.nbytes for tensor in _tensors(cache))


def _tensors(cache: Cache) -> Iterator[Tensor]:
    for layer in cache.layers:
        own = isinstance(layer, EvictingLayer)
        for tensor in layer.tensors if own else (layer.keys, layer.values):
            if tensor is not None:
                yield tensor
