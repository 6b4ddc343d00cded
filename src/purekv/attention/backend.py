"""The model's own attention function, with masks for caches that transformers cannot describe.

An attention name that transformers does not know gets no mask, so whoever registers one owns
causality and padding: the prefill's mask is the one that the model would have had, and behind an
evicting cache it follows from the entries that the layer really stores.
"""

import copy
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import create_causal_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from purekv.attention.packed import kernels_for_any_length, packed_attention
from purekv.errors import PureKVError
from purekv.ops.ragged_decode import Segments, has_kernel, ragged_decode
from purekv.upstream import CACHE

NAME_PREFIX = "purekv_"
SUPPORTED = ("sdpa", "eager", "flash_attention_2", "flash_attention_3")


class Backend:
    """One attention implementation of transformers, for one decoder stack.

    Raises:
        PureKVError: an implementation whose masks purekv does not know.
    """

    def __init__(self, language_model: nn.Module) -> None:
        self.name: str = language_model.config._attn_implementation
        if self.name.startswith(NAME_PREFIX):
            raise PureKVError("this model is inside another PureKV block; leave that one first")
        if self.name not in SUPPORTED:
            raise PureKVError(
                f"attention {self.name!r} is not supported; load the model with "
                f"attn_implementation set to one of {', '.join(SUPPORTED)}"
            )
        # Eager attention is not in transformers' registry: each model's module has its own.
        eager = getattr(
            sys.modules[type(language_model).__module__], "eager_attention_forward", None
        )
        self.forward: Callable[..., tuple[Tensor, Tensor | None]] = (
            ALL_ATTENTION_FUNCTIONS.get_interface(self.name, eager)
        )
        self._config = copy.copy(language_model.config)

    def prefill_mask(
        self, inputs_embeds: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None
    ) -> Tensor | None:
        """The mask that the unmodified model would build on an empty cache.

        Args:
            inputs_embeds: [B, S, hidden].
            attention_mask: [B, S] or None.
            position_ids: text positions [B, S]; only given where no cache is used.
        """
        if attention_mask is None and position_ids is None and self.name != "eager":
            return None  # causal; these implementations see to that themselves
        return create_causal_mask(
            config=self._config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **{CACHE: None},
        )

    def decode(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of new tokens to what an evicting layer holds.

        Shapes are those of attention functions; the mask is `continuation_mask`'s.
        """
        if self.packs(query.shape[2]):
            return packed_attention(query, key, value, mask, kwargs.get("scaling")), None
        with kernels_for_any_length(query.device):
            return self.forward(module, query, key, value, mask, **kwargs)

    def packs(self, q_len: int) -> bool:
        """Whether the query heads of a group share one row of a mask for `decode`."""
        return self.name == "sdpa" and q_len == 1

    def takes_segments(self, device: torch.device) -> bool:
        """Whether `decode_segments` runs there in the place of `decode`."""
        return self.name == "sdpa" and has_kernel(device)

    def decode_segments(
        self, query: Tensor, segments: Segments, scaling: float | None = None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        """Attention of query [B, num_attention_heads, 1, D] to what a ragged layer holds."""
        return ragged_decode(query, segments, scaling or query.shape[-1] ** -0.5), None

    def continuation_mask(self, query: Tensor, kv_len: int, is_entry: Tensor | None) -> Any:
        """The mask of new tokens behind stored entries, for `decode`.

        Args:
            query: [B, num_attention_heads, q_len, D], the newest q_len of the kv_len entries.
            kv_len: entries stored, the new ones included.
            is_entry: bool [B, kv_len] or [B, num_key_value_heads, kv_len], False at padding, or
                None.
        """
        if self.name.startswith("flash"):
            return is_entry
        batch, num_heads, q_len, _ = query.shape
        if is_entry is not None:
            is_entry = is_entry[:, None] if is_entry.ndim == 2 else is_entry
            if is_entry.shape[1] > 1 and not self.packs(q_len):
                is_entry = is_entry.repeat_interleave(num_heads // is_entry.shape[1], dim=1)
        if q_len == 1:
            if is_entry is None:
                return None
            visible = is_entry[:, :, None]
        else:
            visible = torch.ones(q_len, kv_len, dtype=torch.bool, device=query.device)
            visible = visible.tril(kv_len - q_len)[None, None]
            if is_entry is not None:
                visible = visible & is_entry[:, :, None]
        visible = visible.expand(batch, -1, q_len, kv_len)
        if self.name == "sdpa":
            return visible
        blocked = torch.finfo(query.dtype).min
        return torch.zeros_like(visible, dtype=query.dtype).masked_fill(~visible, blocked)
