"""A masked twin: the bare model on a full cache, forbidden to look at what a run evicted.

It attends without purekv's code: plain float32 attention over every key, with a mask that says, for
each (row, KV head), which keys a query may see.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from purekv.cache import EvictingLayer
from purekv.ragged import RaggedLayer
from purekv.selection import RaggedSelection, Selection

Kept = list[list[list[Tensor]]]
"""Positions [layer][row][head]."""


def positions(selection: Selection | RaggedSelection, seq_len: int) -> list[list[Tensor]]:
    """Positions [row][head] of the entries that a layer keeps."""
    if isinstance(selection, RaggedSelection):
        heads = iter((selection.index % seq_len).split(selection.length.flatten().tolist()))
        return [[next(heads) for _ in row] for row in selection.length]
    if selection.is_entry is None:
        return [list(row) for row in selection.index]
    rows = zip(selection.index, selection.is_entry, strict=True)
    return [[head[is_entry] for head in row] for row, is_entry in rows]


@contextmanager
def recorded_selections(monkeypatch: pytest.MonkeyPatch) -> Iterator[Kept]:
    """What layers keep, in order of layers."""
    kept: Kept = []

    def watch(patch: pytest.MonkeyPatch, layer_class: type[EvictingLayer]) -> None:
        evict = layer_class.evict

        def spy(self: Any, key: Tensor, value: Tensor, selection: Any, seen: int) -> None:
            kept.append(positions(selection, key.shape[2]))
            evict(self, key, value, selection, seen)

        patch.setattr(layer_class, "evict", spy)

    with monkeypatch.context() as patch:
        watch(patch, EvictingLayer)
        watch(patch, RaggedLayer)
        yield kept


@contextmanager
def masked_attention(model: Any, allowed: Callable[[int, int, int], Tensor]) -> Iterator[None]:
    """Within the block, `model` attends causally, and only where it is allowed to.

    allowed: from (layer_idx, q_len, kv_len) to bool [B, num_key_value_heads, q_len, kv_len]; the
        queries are the newest positions.
    """

    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **_: Any
    ) -> tuple[Tensor, None]:
        q_len, kv_len = query.shape[2], key.shape[2]
        position = torch.arange(kv_len - q_len, kv_len)
        visible = torch.arange(kv_len) <= position[:, None]
        visible = visible & allowed(module.layer_idx, q_len, kv_len)
        groups = query.shape[1] // key.shape[1]
        key, value, visible = (x.repeat_interleave(groups, dim=1) for x in (key, value, visible))
        logits = (query @ key.transpose(-1, -2)) * scaling
        weights = logits.masked_fill(~visible, -1e30).softmax(-1)
        return (weights @ value).transpose(1, 2).contiguous(), None

    text_config = model.config.text_config
    before = text_config._attn_implementation
    ALL_ATTENTION_FUNCTIONS["masked_twin"] = attend
    text_config._attn_implementation = "masked_twin"
    try:
        yield
    finally:
        text_config._attn_implementation = before
        del ALL_ATTENTION_FUNCTIONS["masked_twin"]


@contextmanager
def twin_attention(
    model: Any,
    inputs: dict[str, Tensor],
    kept: Kept,
    first_token: str,
    active: Collection[int] = (),
) -> Iterator[None]:
    """Within the block, `model` attends densely but as if only the kept entries were left: from the
    prefill on in `active` layers, behind it in all others."""
    ids = inputs["input_ids"]
    batch, seq_len = ids.shape
    is_token = inputs["attention_mask"].bool()
    tokens = [getattr(model.config, f"{kind}_token_id", -1) for kind in ("image", "video")]
    is_visual = torch.isin(ids, torch.tensor(tokens))
    after_visual = is_visual.flip(-1).cumsum(-1).flip(-1) == 0  # text behind the last visual
    num_kv_heads = model.config.text_config.num_key_value_heads

    def allowed(layer_idx: int, q_len: int, kv_len: int) -> Tensor:
        stays = torch.zeros(batch, num_kv_heads, kv_len, dtype=torch.bool)
        stays[..., seq_len:] = True
        for row in range(batch):
            for head in range(num_kv_heads):
                stays[row, head, kept[layer_idx][row][head]] = True
        stays[..., :seq_len] |= (is_token & ~is_visual)[:, None]  # the tail runs again
        sees_all = torch.zeros(batch, q_len, dtype=torch.bool)
        if kv_len == q_len and layer_idx not in active:  # prefill
            sees_all[:] = True if first_token == "exact" else ~after_visual
        visible = stays[:, :, None] | sees_all[:, None, :, None]
        visible[..., :seq_len] &= is_token[:, None, None]
        return visible

    with masked_attention(model, allowed):
        yield
