"""Column sums of the whole prefill attention, without ever holding its matrix."""

import torch
from torch import Tensor

from purekv.window import BLOCK_ELEMENTS

# Queries of one block. A block only meets the keys up to its last query, so small blocks skip
# nearly all of the future half of the matrix; large ones keep matrix products efficient.
BLOCK_QUERIES = 64
_PADDING = -1e30  # finite: a query of the padding, which sees nothing else, makes no NaN


def accumulated_attention(query: Tensor, key: Tensor, scaling: float, is_token: Tensor) -> Tensor:
    """Attention that every position gets from all tokens behind it and itself, summed.

    Computed block by block of queries, in float32.

    Args:
        query: [B, num_attention_heads, S, D], rotated.
        key: [B, num_key_value_heads, S, D], rotated.
        scaling: factor on the dot products.
        is_token: bool [B, S], False at padding.

    Returns:
        float32 [B, num_key_value_heads, groups, S]; 0 at padding. A row sums to its tokens.
    """
    batch, num_heads, seq_len, _ = query.shape
    num_kv_heads = key.shape[1]
    groups = num_heads // num_kv_heads
    rows = batch * num_kv_heads
    # The query heads of a KV head share its keys: they are rows of one product.
    queries = query.unflatten(1, (num_kv_heads, groups)).flatten(0, 1)  # [B * Hkv, groups, S, D]
    key_t = (key.float() * scaling).flatten(0, 1).transpose(1, 2)  # [B * Hkv, D, S]
    per_head = is_token[:, None].expand(-1, num_kv_heads, -1).flatten(0, 1)  # [B * Hkv, S]
    bias = torch.zeros(rows, 1, seq_len, device=key.device).masked_fill_(
        ~per_head[:, None], _PADDING
    )
    weight = per_head.float()[:, None, None].expand(-1, groups, -1, -1)  # [B * Hkv, groups, 1, S]
    total = torch.zeros(rows, groups, seq_len, device=key.device)
    step = min(BLOCK_QUERIES, max(1, BLOCK_ELEMENTS // (batch * num_heads * seq_len)))
    future = torch.ones(step, step, dtype=torch.bool, device=key.device).triu_(1)
    for start in range(0, seq_len, step):
        stop = min(start + step, seq_len)
        block = queries[:, :, start:stop].float().flatten(1, 2)
        logits = torch.baddbmm(bias[..., :stop], block, key_t[..., :stop])
        logits = logits.unflatten(1, (groups, -1))  # [B * Hkv, groups, w, stop]
        width = stop - start
        logits[..., start:].masked_fill_(future[:width, :width], -torch.inf)
        total[..., :stop] += (weight[..., start:stop] @ logits.softmax(-1)).squeeze(-2)
    # A query of the padding was weighted by zero; a key of it got exp(-1e30).
    return total.unflatten(0, (batch, num_kv_heads))
