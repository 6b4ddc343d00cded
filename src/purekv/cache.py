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
        self._evicted = 0
        """Tokens seen that `keys` does not hold, padding counted as the batch counts it."""
        self.prompt_entries = 0
        """Of the physical length, those that the prefill left; later ones are stored one for
        one."""
        self.trailing_text = 0
        """Newest tokens of the prompt that every row keeps: nothing behind them was evicted."""
        self._is_entry: Tensor | None = None

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

        Nobody asks within a PureKV block, where masks are ours.

        Raises:
            PureKVError: such a mask would be wrong here.
        """
        if self._evicted and not self.maskable:
            raise PureKVError(
                "rows or heads of this cache keep different numbers of entries, which only "
                "PureKV can mask; go on with it inside a PureKV block"
            )
        return self.dense_length + query_length, self._evicted

    @property
    def maskable(self) -> bool:
        """Whether causality is all that a mask has to see to."""
        return self._is_entry is None

    @property
    def is_entry(self) -> Tensor | None:
        """bool [B, physical length], False at padding; None if there is no padding."""
        return self._dense_entries()

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
        self._evicted = seen - self.physical_length

    def reset(self) -> None:
        self._evicted = self.prompt_entries = self.trailing_text = 0
        self._is_entry = None
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


def make_evicting(
    cache: Cache, num_layers: int, layer_class: type[EvictingLayer] = EvictingLayer
) -> None:
    """Turn an empty `DynamicCache` into one that can evict, with layers of that class.

    Raises:
        PureKVError: the cache is of another kind (static, quantized, sliding ...).
    """
    supported = all(
        type(layer) is DynamicLayer or isinstance(layer, EvictingLayer) for layer in cache.layers
    )
    lazy = cache.layer_class_to_replicate in (None, DynamicLayer)
    if not supported or not lazy or cache.offloading:
        kinds = sorted({type(layer).__name__ for layer in cache.layers})
        raise PureKVError(
            f"{type(cache).__name__} ({', '.join(kinds) or 'offloading'}) cannot be compressed; "
            "use a DynamicCache, which generate makes by default (no cache_implementation)"
        )
    cache.layer_class_to_replicate = None
    cache.layers = [layer_class() for _ in range(num_layers)]


def cache_bytes(cache: Cache) -> int:
    """Bytes that the cache's tensors hold allocated, padding included."""
    storages = {}
    for layer in cache.layers:
        own = isinstance(layer, EvictingLayer)
        for tensor in layer.tensors if own else (layer.keys, layer.values):
            if tensor is not None:
                storage = tensor.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())
