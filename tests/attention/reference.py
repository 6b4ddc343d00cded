"""Attention by its definition: a mask and a softmax, in float64. Shares no code with purekv but the
mask."""

import torch
from torch import Tensor

from purekv.attention.pattern import Pattern


def masked_attention(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, patterns: list[Pattern]
) -> Tensor:
    """float64 [B, S, H, D]; 0 at padding."""
    seq_len = query.shape[2]
    groups = query.shape[1] // key.shape[1]
    query, key, value = query.double(), key.double(), value.double()
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    visible = torch.stack([p.visible(torch.arange(seq_len), seq_len) for p in patterns])[:, None]
    logits = (query @ key.mT * scaling).masked_fill(~visible.to(query.device), -torch.inf)
    return logits.softmax(-1).nan_to_num(0.0).matmul(value).transpose(1, 2)
