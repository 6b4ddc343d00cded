"""Attention of a whole prompt on the entries that a layer keeps (`evict="active"`)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from purekv.window import BLOCK_ELEMENTS

BLOCK_QUERIES = 2048
"""Of one block, at most."""
NEVER_SEEN = torch.iinfo(torch.int64).max
"""The position of an entry that no query sees."""


def attend_to_kept(
    query: Tensor, key: Tensor, value: Tensor, position: Tensor, scaling: float
) -> Tensor:
    """Causal attention of every position on some entries.

    Which ones they are differs from head to head, so that it takes a mask: it is built for a block
    of queries at a time. Waits for the device once, to learn behind which entry no query of a block
    sees any: entries are in order of position, so that this saves about half of the work.

    Args:
        query: [B, num_attention_heads, S, D], of positions 0 to S - 1.
        key, value: [B, num_key_value_heads, width, D].
        position: int64 [B, num_key_value_heads, width]; where the entries are. In order, for the
            most part.
        scaling: factor on the dot products.

    Returns:
        [B, S, num_attention_heads, D]; 0 at queries that see no entry.
    """
    batch, num_kv_heads, width = position.shape
    seq_len, groups = query.shape[2], query.shape[1] // num_kv_heads
    # A batch of KV heads: the query heads of one share its keys and its mask.
    query = query.unflatten(1, (num_kv_heads, groups)).flatten(0, 1)
    key, value = (x.flatten(0, 1)[:, None].expand(-1, groups, -1, -1) for x in (key, value))
    position = position.flatten(0, 1)[:, None, None]  # [B * Hkv, 1, 1, width]
    first = position.amin(-1)
    step = max(1, min(BLOCK_QUERIES, BLOCK_ELEMENTS // (batch * num_kv_heads * width)))
    starts = range(0, seq_len, step)
    before = torch.arange(step, seq_len + step, step, device=position.device)
    stops = _entries_seen(position.amin((0, 1, 2)), before)
    blocks = []
    for start, stop in zip(starts, stops, strict=True):
        queries = query[:, :, start : start + step]
        number = torch.arange(start, start + queries.shape[2], device=query.device)
        mask = position[..., :stop] <= number[:, None]
        out = F.scaled_dot_product_attention(
            queries, key[:, :, :stop], value[:, :, :stop], attn_mask=mask, scale=scaling
        )
        blocks.append(out.masked_fill((number < first)[..., None], 0.0))
    out = torch.cat(blocks, dim=2).unflatten(0, (batch, num_kv_heads)).flatten(1, 2)
    return out.transpose(1, 2).contiguous()


def _entries_seen(position: Tensor, before: Tensor) -> list[int]:
    """How many entries, counted from the first one, queries before these positions need at most.

    position is [width], before [n]; at least one entry, since attention over none is not defined.
    """
    number = torch.arange(1, len(position) + 1, device=position.device)
    seen = torch.where(position < before[:, None], number, 1)
    return seen.amax(-1).tolist()
