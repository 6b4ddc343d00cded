"""Compaction on vLLM's FlashAttention backend, for NVIDIA GPUs.

Written against vLLM 0.32's sources and tested on CPU tensors; never run inside vLLM on a GPU.

- CUDA graphs: which rows have holes is decided on the host, into new tensors, at each step. So no
  full graph may hold attention; piecewise ones leave it out, and behind it the compaction.
- Plans made ahead (`scheduler_metadata` of FlashAttention 3) are made by vLLM's builder from the
  lengths that it is given, which are those without holes already. `max_seq_len` stays the logical
  one: an upper bound, from which only the split of the work follows.
- Nothing waits for the device in steps where no prompt ends: rows are named by the worker, lengths
  come from vLLM's copy on the CPU, holes are sent from pinned memory.
"""

from typing import Any

from torch import Tensor
from vllm.utils.torch_utils import is_quantized_kv_cache
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
)

from purekv.errors import PureKVError
from purekv.serving.backend import CompactingBuilder, CompactingImpl, customized
from purekv.serving.settings import ServingConfig


class CompactingFlashBuilder(CompactingBuilder, FlashAttentionMetadataBuilder):
    """
    Raises:
        PureKVError: attention would be captured in CUDA graphs, in spite of the support declared.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self._settings is None:
            return
        if self.use_full_cuda_graph:
            raise PureKVError(
                "purekv cannot serve: a full CUDA graph would replay the block tables it was "
                'captured with; add --compilation-config \'{"cudagraph_mode": "PIECEWISE"}\''
            )
        # The shortcut for groups of layers that differ in their tables only takes these as they
        # are, with holes; each group is to be built by itself.
        self.supports_update_block_table = False

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        """None where compression is asked for: vLLM then falls back to piecewise graphs by
        itself, with a warning, or names the option where it was told to capture everything."""
        if ServingConfig.among(vllm_config.additional_config):
            return AttentionCGSupport.NEVER
        return super().get_cudagraph_support(vllm_config, kv_cache_spec)


def check_layer(impl: Any) -> None:
    """Refuse layers whose attention is not what scores are measured by.

    Args:
        impl: a `FlashAttentionImpl`.

    Raises:
        PureKVError: the first reason, with the fix.
    """
    reasons = (
        (impl.sinks is not None, "attention sinks take a share that scores do not know of"),
        (impl.alibi_slopes is not None, "scores do not know of ALiBi's slopes"),
        (bool(impl.logits_soft_cap), "scores do not know of the soft cap on logits"),
    )
    for refused, reason in reasons:
        if refused:
            raise PureKVError(f"purekv cannot serve: {reason}; serve this model without purekv")
    if is_quantized_kv_cache(impl.kv_cache_dtype):  # where the checkpoint asks for it, not a flag
        raise PureKVError(
            f"purekv cannot serve: a quantised cache ({impl.kv_cache_dtype}) would be quantised "
            "twice; use --kv-cache-dtype bfloat16"
        )


def stored_states(kv_cache: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values at these slots, [n, num_key_value_heads, D] each, of a cache
    [num_blocks, num_key_value_heads, block_size, 2 * D].

    That is the shape which vLLM gives every layer; in which order its dimensions lie in memory
    (NHD, HND and four more) shows in the strides only.
    """
    block_size = kv_cache.shape[2]
    key, value = kv_cache[slots // block_size, :, slots % block_size].chunk(2, -1)
    return key, value


class CompactingFlashImpl(CompactingImpl, FlashAttentionImpl):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.compacts:
            check_layer(self)

    def stored(self, kv_cache: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        return stored_states(kv_cache, slots)


class CompactingFlashBackend(FlashAttentionBackend):
    @staticmethod
    def get_impl_cls() -> type[Any]:
        return CompactingFlashImpl

    @staticmethod
    def get_builder_cls() -> type[Any]:
        return CompactingFlashBuilder

    @classmethod
    def customize_spec(cls, spec: Any) -> Any:
        return customized(super().customize_spec(spec))
