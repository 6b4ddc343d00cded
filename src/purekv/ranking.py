"""Who is best, with ties decided the same way on every device, and without waiting for it."""

from collections.abc import Sequence

import torch
from torch import Tensor

NEVER = torch.iinfo(torch.int64).min
"""Below every key."""
_ABOVE = torch.iinfo(torch.int64).max


def unique_keys(scores: Tensor) -> Tensor:
    """int64 keys in the order of float32 scores [B, H, S].

    Of equal scores the earlier position wins, and at one position the first head.
    """
    bits = (scores + 0.0).contiguous().view(torch.int32)  # + 0.0: minus zero is zero
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    _, num_heads, seq_len = scores.shape
    before = torch.arange(seq_len, device=scores.device) * num_heads
    before = before + torch.arange(num_heads, device=scores.device)[:, None]  # [H, S]
    return (ordered.long() << 32) + (num_heads * seq_len - 1 - before)


def kth_largest(keys: Tensor, counts: Sequence[int]) -> Tensor:
    """The `counts[b]`-th largest of keys[b, ..., :], [B, ..., 1]; above all for a count of 0."""

    def kth(rows: Tensor, count: int) -> Tensor:
        if count == 0:
            return rows.new_full((*rows.shape[:-1], 1), _ABOVE)
        return rows.topk(count, sorted=False).values.amin(-1, keepdim=True)

    if len(set(counts)) == 1:
        return kth(keys, counts[0])
    return torch.cat([kth(keys[row : row + 1], count) for row, count in enumerate(counts)])


def places_of(scores: Tensor, is_visual: Tensor) -> Tensor:
    """Place of each position by its score, float32 [B, H, S]; 0 is the best visual one of its row
    and head, equal scores in order, and what is not visual comes last.

    Args:
        scores: [B, H, S].
        is_visual: bool [B, S].
    """
    scores = scores.masked_fill(~is_visual[:, None], -torch.inf)
    order = scores.argsort(dim=-1, descending=True, stable=True)
    return order.argsort(dim=-1).float()
