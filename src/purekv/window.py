"""The observation window: the text queries whose attention says which visual tokens matter."""

from dataclasses import dataclass

import torch
from torch import Tensor

from purekv.errors import PureKVError
from purekv.layout import Layout

# Upper limit of the float32 logits that one block of observing queries may take, in elements.
BLOCK_ELEMENTS = 2**25


@dataclass(frozen=True)
class Window:
    """Positions of the observing queries, W a row; rows with fewer are padded."""

    position: Tensor
    """int64 [B, W]: where the query is in its row (0 where `is_query` is False)."""
    is_query: Tensor
    """bool [B, W]."""

    def to(self, device: torch.device) -> "Window":
        return Window(self.position.to(device), self.is_query.to(device))


def observation_window(layout: Layout, window: int | str) -> Window:
    """Choose the observing queries of each row.

    Args:
        layout: of the prompt, on the CPU.
        window: "question" for all text after the row's last visual token, or N for the last N
            text tokens of the row.

    Raises:
        PureKVError: a row has visual tokens and no text behind them to observe with.
    """
    if window == "question":
        is_query = layout.is_tail
    else:
        text = layout.is_text
        is_query = text & (text.flip(-1).cumsum(-1).flip(-1) <= int(window))
    counts = is_query.sum(-1)
    for row, visual in enumerate(layout.visual_tokens):
        if visual and not counts[row]:
            raise PureKVError(
                f"row {row} of the prompt has no text after its last visual token to score with; "
                "put the question behind the video, or set window=N to use the last N text tokens"
            )
    width = int(counts.max())
    order = torch.argsort((~is_query).to(torch.uint8), dim=-1, stable=True)[:, :width]
    valid = torch.arange(width) < counts[:, None]
    return Window(order.masked_fill(~valid, 0), valid)


def window_attention(
    query: Tensor, key: Tensor, scaling: float, window: Window, is_token: Tensor
) -> Tensor:
    """Mean attention that the window's queries pay to every position, per query head.

    Only W rows of the attention matrix are computed, block by block, in float32.

    Args:
        query: [B, num_attention_heads, S, D], rotated.
        key: [B, num_key_value_heads, S, D], rotated.
        scaling: factor on the dot products.
        window: the observing queries, on the same device.
        is_token: bool [B, S], False at padding.

    Returns:
        float32 [B, num_key_value_heads, groups, S]; each row sums to 1 (to 0 in a row of the
        batch that has no window).
    """
    rows = window.position[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3])
    return observed_attention(query.gather(2, rows), key, scaling, window, is_token)


def observed_attention(
    observers: Tensor, key: Tensor, scaling: float, window: Window, is_token: Tensor
) -> Tensor:
    """The same, from the window's queries alone: [B, num_attention_heads, W, D], in its order."""
    batch, num_heads, width, head_dim = observers.shape
    num_kv_heads, seq_len = key.shape[1:3]
    groups = num_heads // num_kv_heads
    observers = observers.float().view(batch, num_kv_heads, groups, width, head_dim) * scaling
    key_t = key.float().transpose(-1, -2)  # [B, Hkv, D, S]
    positions = torch.arange(seq_len, device=key.device)
    total = torch.zeros(batch, num_kv_heads, groups, seq_len, device=key.device)
    step = max(1, BLOCK_ELEMENTS // (batch * num_heads * seq_len))
    for start in range(0, width, step):
        block = slice(start, start + step)
        is_query = window.is_query[:, block]
        visible = positions <= window.position[:, block, None]  # causal, [B, w, S]
        # A query that is only padding of the window looks everywhere; it is weighted by zero.
        visible = (visible & is_token[:, None]) | ~is_query[..., None]
        # The query heads of a KV head share its keys: they are rows of one product.
        logits = (observers[:, :, :, block].flatten(2, 3) @ key_t).unflatten(2, (groups, -1))
        logits.masked_fill_(~visible[:, None, None], -torch.inf)
        weight = is_query[:, None, None, None].float()  # [B, 1, 1, 1, w]
        weight = weight.expand(-1, num_kv_heads, groups, -1, -1)
        total += (weight @ logits.softmax(-1)).squeeze(-2)
    queries = window.is_query.sum(-1).clamp(min=1)
    return total / queries[:, None, None, None]
