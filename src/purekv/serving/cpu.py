"""Compaction on vLLM's CPU attention backend."""

from typing import Any

from torch import Tensor
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
)

from purekv.serving.backend import CompactingBuilder, CompactingImpl, customized


class CompactingCPUBuilder(CompactingBuilder, CPUAttentionMetadataBuilder):
    pass


class CompactingCPUImpl(CompactingImpl, CPUAttentionBackendImpl):
    def stored(self, kv_cache: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        # A block of a head holds its keys as columns and behind them its values as rows.
        blocks, heads, block_size, width = kv_cache.shape
        flat = kv_cache.view(blocks, heads, 2, -1)
        keys = flat[:, :, 0].view(blocks, heads, width // 2, block_size)
        values = flat[:, :, 1].view(blocks, heads, block_size, width // 2)
        block, place = slots // block_size, slots % block_size
        return keys[block, :, :, place], values[block, :, place]


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
