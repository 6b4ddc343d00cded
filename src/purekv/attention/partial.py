"""Attention over some of the keys, with what it takes to add the others later.

Softmax over a union of disjoint sets of keys follows from the softmax over each and the logarithm
of its normaliser (log-sum-exp, natural): `out = sum_i out_i exp(lse_i - lse)` with
`lse = log sum_i exp(lse_i)`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from purekv.window import BLOCK_ELEMENTS

FEW_QUERIES = 256
"""A kernel's parallel parts are blocks of queries: with as few as these, keys are split as well."""
CHUNK = 2048
"""Keys of one part then."""


@dataclass
class Partial:
    """Attention over a set of keys."""

    out: Tensor
    """[N, H, L, D]"""
    lse: Tensor
    """[N, H, L], float32 (float64 for float64 inputs)."""

    def widened(self) -> "Partial":
        """A copy that others can be added to: float32, or float64."""
        return Partial(self.out.to(self.lse.dtype, copy=True), self.lse.clone())

    def unflatten(self, dim: int, sizes: tuple[int, ...]) -> "Partial":
        """Views with more dimensions; `dim` counts from the front."""
        return Partial(self.out.unflatten(dim, sizes), self.lse.unflatten(dim, sizes))

    def add(self, other: "Partial") -> None:
        """Take in, in place, attention of the same queries over other keys."""
        lse = torch.logaddexp(self.lse, other.lse)
        self.out.mul_((self.lse - lse).exp_()[..., None])
        self.out.add_(other.out * (other.lse - lse).exp_()[..., None])
        self.lse.copy_(lse)

    @classmethod
    def union(cls, parts: "Partial") -> "Partial":
        """[1, H, L, D] of [N, H, L, D]: one set of queries, N sets of keys."""
        lse = parts.lse.logsumexp(0, keepdim=True)
        weight = (parts.lse - lse).exp_()[..., None]
        return cls((parts.out * weight).sum(0, keepdim=True), lse)


def attend(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, causal: bool = False
) -> Partial:
    """Attention of all queries over all keys, by the fastest kernel that answers its log-sum-exp.

    Args:
        query: [N, H, L, D], any strides but for the last dimension.
        key, value: [N, Hkv, n, D]; H is a multiple of Hkv, whose query heads follow each other.
        causal: each query sees the keys up to its own number; L equals n then.
    """
    few, long = query.shape[2] <= FEW_QUERIES, key.shape[2] >= 4 * CHUNK
    if few and long and not causal and query.shape[0] == 1:
        return _attend_in_chunks(query, key, value, scaling)
    return _attend(query, key, value, scaling, causal)


def _attend_in_chunks(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Partial:
    chunks = key.shape[2] // CHUNK
    grouped = query.shape[1] // key.shape[1], query.shape[2]
    # The query heads of a KV head see the same keys: as rows of one block they fill it.
    rows = query.unflatten(1, (key.shape[1], -1)).flatten(2, 3)

    def parts(x: Tensor) -> Tensor:
        return x[0, :, : chunks * CHUNK].unflatten(1, (chunks, CHUNK)).transpose(0, 1)

    same = rows.expand(chunks, -1, -1, -1)
    found = Partial.union(_attend(same, parts(key), parts(value), scaling, False))
    if key.shape[2] > chunks * CHUNK:
        rest = slice(chunks * CHUNK, None)
        found.add(_attend(rows, key[:, :, rest], value[:, :, rest], scaling, False))
    apart = found.unflatten(2, grouped)
    return Partial(apart.out.flatten(1, 2), apart.lse.flatten(1, 2))


def _attend(query: Tensor, key: Tensor, value: Tensor, scaling: float, causal: bool) -> Partial:
    if query.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, causal, scale=scaling
        )
        return Partial(out, lse)
    head_dim = query.shape[-1]
    half = query.dtype in (torch.float16, torch.bfloat16)
    if query.device.type == "cuda" and half and head_dim % 8 == 0 and head_dim <= 256:
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
            query, key, value, 0.0, causal, scale=scaling
        )
        return Partial(out, lse)
    visible = None
    if causal:
        length = query.shape[2]
        visible = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
    return plain_attention(query, key, value, scaling, visible)


def plain_attention(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, visible: Tensor | None = None
) -> Partial:
    """The same in plain operations: for devices without such a kernel, and to compare with.

    Args:
        visible: bool [L, n], the keys that each query sees, at least one; None: all.

    Returns:
        float32, or float64 for float64 inputs; the matrix is computed in blocks of queries.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    groups = query.shape[1] // key.shape[1]
    # The query heads of a KV head share its keys.
    query = query.to(wide).unflatten(1, (-1, groups)) * scaling
    key, value = key.to(wide)[:, :, None], value.to(wide)[:, :, None]
    rows = query.shape[0] * query.shape[1] * groups * key.shape[3]
    blocks = []
    for part in torch.arange(query.shape[3]).split(max(1, BLOCK_ELEMENTS // rows)):
        block = slice(int(part[0]), int(part[-1]) + 1)
        logits = query[:, :, :, block] @ key.mT
        if visible is not None:
            logits.masked_fill_(~visible[block], -torch.inf)
        lse = logits.logsumexp(-1)
        blocks.append(((logits - lse[..., None]).exp_() @ value, lse))
    out, lse = (torch.cat(parts, dim=3) for parts in zip(*blocks, strict=True))
    return Partial(out.flatten(1, 2), lse.flatten(1, 2))
