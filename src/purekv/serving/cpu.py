"""Compaction on vLLM's CPU attention backend."""

from typing import Any

from torch import Tensor
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
)

from purekv.errors import PureKVError
from purekv.serving.backend import CompactingBuilder, CompactingImpl, customized


class CompactingCPUBuilder(CompactingBuilder, CPUAttentionMetadataBuilder):
    """
    Raises:
        PureKVError: vLLM's kernels for this CPU and dtype store keys and values in an order of
            their own.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self._settings is not None:
            check_layout(self.isa, self.dtype)


def check_layout(isa: str, dtype: Any) -> None:
    """Refuse kernels whose blocks `stored_states` cannot read.

    Args:
        isa: which kernels vLLM chose: "amx" for bfloat16 on a CPU with AMX tiles, "neon" on ARM.
        dtype: the model's.
    """
    if isa == "amx":
        raise PureKVError(
            f"purekv cannot serve: in {dtype} on this CPU vLLM packs the cache into AMX tiles, "
            "where no entry lies by itself; add --dtype float16 or --dtype float32"
        )
    if isa not in ("vec", "vec16"):
        raise PureKVError(
            f"purekv cannot serve: vLLM's attention for this CPU ({isa}) stores the cache in a way "
            "that was not tested; serve on x86, or without purekv"
        )


def stored_states(kv_cache: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values at these slots, [n, num_key_value_heads, D] each, of a cache
    [num_blocks, num_key_value_heads, block_size, 2 * D]."""
    # A block of a head holds its keys as columns and behind them its values as rows.
    blocks, heads, block_size, width = kv_cache.shape
    flat = kv_cache.view(blocks, heads, 2, -1)
    keys = flat[:, :, 0].view(blocks, heads, width // 2, block_size)
    values = flat[:, :, 1].view(blocks, heads, block_size, width // 2)
    block, place = slots // block_size, slots % block_size
    return keys[block, :, :, place], values[block, :, place]


class CompactingCPUImpl(CompactingImpl, CPUAttentionBackendImpl):
    def stored(self, kv_cache: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        return stored_states(kv_cache, slots)


class CompactingCPUBackend(CPUAttentionBackend):
    @staticmethod
    def get_impl_cls() -> type[Any]:
        return CompactingCPUImpl

    @staticmethod
    def get_builder_cls() -> type[Any]:
        return CompactingCPUBuilder

    @classmethod
    def customize_spec(cls, spec: Any) -> Any:
        return customized(super().customize_spec(spec))
