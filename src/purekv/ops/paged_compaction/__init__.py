"""Moving a prompt's kept entries together, in the blocks of a paged KV cache."""

from importlib.util import find_spec

import torch
from torch import Tensor

from purekv.ops.paged_compaction.reference import paged_compaction as reference

__all__ = ["has_kernel", "paged_compaction", "reference"]


def has_kernel(device: torch.device) -> bool:
    """Whether the kernel runs there."""
    return device.type == "cuda" and find_spec("triton") is not None


def paged_compaction(
    key_cache: Tensor, value_cache: Tensor, table: Tensor, kept: Tensor, tokens: int
) -> None:
    """As the reference, but on a GPU without a copy of what is kept."""
    if not has_kernel(key_cache.device):
        return reference(key_cache, value_cache, table, kept, tokens)
    from purekv.ops.paged_compaction.kernel import paged_compaction as kernel

    return kernel(key_cache, value_cache, table, kept, tokens)
