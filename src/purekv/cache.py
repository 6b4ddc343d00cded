"""A cache layer that forgets: fewer entries than tokens seen, and the bytes really freed."""

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from purekv.errors import PureKVError
from purekv.selection import Selection


class EvictingLayer(DynamicLayer):
    """A dynamic layer whose *logical* length (tokens seen) may exceed its *physical* one.

    `generate` slices inputs by the logical length and positions go on from it, so a compressed
    cache continues like the full one. Rows that kept fewer entries are padded.
    """

    def __init__(self) -> None:
        super().__init__()
        self.evicted = 0
        """Tokens seen that are no longer stored, padding counted as the batch counts it."""
        self.prompt_entries = 0
        """Entries that the prefill left; those behind them are stored one for one."""
        self._is_entry: Tensor | None = None

    @property
    def physical_length(self) -> int:
        return super().get_seq_length()

    def get_seq_length(self) -> int:
        """Logical length: tokens seen, padding included."""
        return self.physical_length + self.evicted

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.physical_length + query_length, self.evicted

    @property
    def is_entry(self) -> Tensor | None:
        """bool [B, physical length], False at padding; None if there is no padding."""
        if self._is_entry is None:
            return None
        missing = self.physical_length - self._is_entry.shape[1]
        return torch.nn.functional.pad(self._is_entry, (0, missing), value=True)

    def mark_padding(self, is_token: Tensor) -> None:
        """Say which of the newest entries are padding: bool [B, entries], False at padding."""
        is_token = is_token.to(self.keys.device)
        entries = self.physical_length - is_token.shape[1]
        before = self.is_entry
        if before is None:
            before = is_token.new_ones(is_token.shape[0], entries)
        self._is_entry = torch.cat([before[:, :entries], is_token], dim=1)

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
        self._is_entry = selection.is_entry
        self.prompt_entries = self.physical_length
        self.evicted = seen - self.physical_length

    def reset(self) -> None:
        self.evicted = self.prompt_entries = 0
        self._is_entry = None
        self.keys = self.values = None
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens: a negative count, or the logical length to go back to."""
        remove = -tokens_to_remove
        if tokens_to_remove > 0:
            remove = max(0, self.get_seq_length() - tokens_to_remove)
        if remove == 0:
            return
        if self._is_entry is not None:
            self._is_entry = self.is_entry[:, :-remove]  # type: ignore[index]
        self.keys = self.keys[..., :-remove, :]
        self.values = self.values[..., :-remove, :]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        if self._is_entry is not None:
            self._is_entry = self._is_entry.index_select(0, beam_idx.to(self._is_entry.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        if self._is_entry is not None:
            self._is_entry = self._is_entry.repeat_interleave(repeats, dim=0)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        if self._is_entry is not None:
            self._is_entry = self._is_entry[indices]


def is_compressed(cache: Cache) -> bool:
    """Whether the cache was filled by a PureKV run."""
    return bool(cache.layers) and all(isinstance(layer, EvictingLayer) for layer in cache.layers)


def make_evicting(cache: Cache, num_layers: int) -> None:
    """Turn an empty `DynamicCache` into one that can evict.

    Raises:
        PureKVError: the cache is of another kind (static, quantized, sliding ...).
    """
    supported = all(type(layer) in (DynamicLayer, EvictingLayer) for layer in cache.layers)
    lazy = cache.layer_class_to_replicate in (None, DynamicLayer)
    if not supported or not lazy or cache.offloading:
        kinds = sorted({type(layer).__name__ for layer in cache.layers})
        raise PureKVError(
            f"{type(cache).__name__} ({', '.join(kinds) or 'offloading'}) cannot be compressed; "
            "use a DynamicCache, which generate makes by default (no cache_implementation)"
        )
    cache.layer_class_to_replicate = None
    cache.layers = [EvictingLayer() for _ in range(num_layers)]


def cache_bytes(cache: Cache) -> int:
    """Bytes that the cache's tensors hold allocated, padding included."""
    storages = {}
    for layer in cache.layers:
        for tensor in (layer.keys, layer.values):
            if tensor is not None:
                storage = tensor.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())
