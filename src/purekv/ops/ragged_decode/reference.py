"""What the kernel computes, head by head in float32."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Segments:
    """Where the entries of each (row, KV head) are: some lie flat, the later ones densely."""

    flat_key: Tensor
    """[entries, D]"""
    flat_value: Tensor
    """[entries, Dv]"""
    start: Tensor
    """int64 [B, num_key_value_heads]; the first flat entry of each head."""
    length: Tensor
    """int64 [B, num_key_value_heads]; how many follow."""
    longest: int
    """No length is above this."""
    later_key: Tensor
    """[B, num_key_value_heads, n, D]; every head has these too. A view with room behind is fine."""
    later_value: Tensor
    """[B, num_key_value_heads, n, Dv]"""
    later_mask: Tensor | None
    """bool [B, n], False at padding; or None."""


def ragged_decode(query: Tensor, segments: Segments, scale: float) -> Tensor:
    """Attention of query [B, num_attention_heads, 1, D]: [B, 1, num_attention_heads, Dv]."""
    s = segments
    batch, num_heads = s.start.shape
    grouped = query.float().view(batch, num_heads, -1, query.shape[-1])
    outputs = []
    for row in range(batch):
        later = slice(None) if s.later_mask is None else s.later_mask[row]
        for head in range(num_heads):
            start, length = int(s.start[row, head]), int(s.length[row, head])
            flat = slice(start, start + length)
            key = torch.cat([s.flat_key[flat], s.later_key[row, head, later]]).float()
            value = torch.cat([s.flat_value[flat], s.later_value[row, head, later]]).float()
            outputs.append((grouped[row, head] @ key.T * scale).softmax(-1) @ value)
    return torch.stack(outputs).view(batch, 1, query.shape[1], -1).to(query.dtype)
