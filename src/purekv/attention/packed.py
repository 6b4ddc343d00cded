"""Decode attention that copies no key and no value for the query heads of a group."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.backends import cuda


def packed_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None
) -> Tensor:
    """Attention of one new token, the query heads of a KV group being rows of one matrix.

    SDPA's other ways to serve groups are `enable_gqa`, which runs its slow path where there is a
    mask, and repeated keys and values, as transformers up to 5.23 does there.

    Args:
        query: [B, num_attention_heads, 1, D].
        key, value: [B, num_key_value_heads, entries, D]; views are taken as they are.
        mask: bool [B, 1 or num_key_value_heads, 1, entries], True where visible; or None.

    Returns:
        [B, 1, num_attention_heads, D].
    """
    batch, num_heads, _, head_dim = query.shape
    rows = query.view(batch, key.shape[1], -1, head_dim)
    with kernels_for_any_length(query.device):
        output = F.scaled_dot_product_attention(rows, key, value, attn_mask=mask, scale=scale)
    return output.reshape(batch, 1, num_heads, -1)


@contextmanager
def kernels_for_any_length(device: torch.device) -> Iterator[None]:
    """Keep cuDNN out: SDPA prefers it on Hopper, and it plans anew, for tens of milliseconds, for
    every shape. In decoding that is every step; where layers keep different numbers of entries,
    every layer as well."""
    allowed = device.type == "cuda" and cuda.cudnn_sdp_enabled()
    if allowed:
        cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        if allowed:
            cuda.enable_cudnn_sdp(True)
