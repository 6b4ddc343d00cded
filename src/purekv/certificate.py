"""How large the error of an eviction can be, layer by layer, on the queries of the window.

For one head and query with attention weights a, kept entries S and dropped ones T, let o be the
output over all of them and o_S that over S alone. `docs/theory.md` has the proofs of

    dropped mass   delta = sum_T a_i = 1 - exp(LSE_S - LSE)
    bound          ||o - o_S|| <= sum_T a_i ||v_i - o_S||
    bound of CLIE  ||o - o_S|| <= sum_T score_i + sum_T (a_i ||v_i|| - score_i)_+ + delta ||o_S||

All are means over the window's queries and the query heads, in which the three still hold. Of the
attention matrix only the rows of the window are computed, block by block, in float32.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from purekv.scoring import LayerInputs
from purekv.window import BLOCK_ELEMENTS


@dataclass(frozen=True)
class LayerCertificate:
    """One layer's, of the batch's worst row. Lengths are shares of the output's, `mean ||o||`."""

    dropped_mass: float
    """Mean share of the window's attention that falls on dropped entries."""
    largest_dropped_mass: float
    """The same of the head and query that lose most."""
    error: float
    """Measured: mean ||o - o_S||."""
    bound: float
    """What the error cannot exceed."""
    dropped_scores: float | None
    """First term of CLIE's bound, the sum of the scores that were dropped; what a top-k minimises.
    None for scorers whose scores are no attention times value norm."""
    transfer: float | None
    """Second term: by how much the layer's own attention exceeds the scores there."""
    kept: float | None
    """Third term: the dropped mass, times the output's length."""
    own_scores: bool
    """Whether the tolerance made the layer fall back to its own attention, in any row."""

    @property
    def clie_bound(self) -> float | None:
        """Sum of the three terms; no smaller than `bound`."""
        if self.dropped_scores is None or self.transfer is None or self.kept is None:
            return None
        return self.dropped_scores + self.transfer + self.kept


@dataclass(frozen=True)
class Measures:
    """The same of every row of the batch, on the layer's device: float32 [B] each."""

    output: Tensor
    """Mean ||o||; the others are not divided by it yet."""
    dropped_mass: Tensor
    largest_dropped_mass: Tensor
    error: Tensor
    bound: Tensor
    dropped_scores: Tensor
    transfer: Tensor
    kept: Tensor

    def where(self, rows: Tensor, other: "Measures") -> "Measures":
        """These in `rows`, bool [B], the other ones elsewhere."""
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return Measures(*(torch.where(rows, mine, others) for mine, others in pairs))

    @property
    def relative_bound(self) -> Tensor:
        """[B]"""
        return self.bound / self.output.clamp(min=1e-12)


@torch.no_grad()
def measure(layer: LayerInputs, dropped: Tensor, scores: Tensor) -> Measures:
    """Compare a layer's attention with that over what it keeps.

    Args:
        dropped: bool [B, num_key_value_heads, S], visual entries that leave.
        scores: float32 [B, num_key_value_heads, S], by which they were chosen.
    """
    window, value = layer.window, layer.value.float()
    batch, num_heads, seq_len, head_dim = layer.query.shape
    num_kv_heads = layer.key.shape[1]
    groups = num_heads // num_kv_heads
    index = window.position[:, None, :, None].expand(-1, num_heads, -1, head_dim)
    query = layer.query.gather(2, index).float().unflatten(1, (num_kv_heads, groups))
    query *= layer.scaling
    key_t = layer.key.float().mT  # [B, Hkv, D, S]
    norm = value.square().sum(-1)[:, :, None]  # [B, Hkv, 1, S]
    gone = dropped[:, :, None]
    positions = torch.arange(seq_len, device=key_t.device)
    step = max(1, BLOCK_ELEMENTS // (batch * num_heads * seq_len))
    found = []
    for start in range(0, window.position.shape[1], step):
        block = slice(start, start + step)
        is_query = window.is_query[:, block]
        visible = positions <= window.position[:, block, None]
        visible = (visible & layer.layout.is_token[:, None]) | ~is_query[..., None]
        # The query heads of a KV head share its keys: they are rows of one product.
        logits = query[:, :, :, block].flatten(2, 3) @ key_t  # [B, Hkv, groups * w, S]
        logits.unflatten(2, (groups, -1)).masked_fill_(~visible[:, None, None], -torch.inf)
        lse = logits.logsumexp(-1, keepdim=True)
        lost = (logits - lse).exp_()  # all weights, so far
        output = lost @ value  # [B, Hkv, groups * w, D]
        # Of what stays, the weights are the same but for a factor.
        logits.masked_fill_(gone, -torch.inf)
        kept_lse = logits.logsumexp(-1, keepdim=True)
        kept = logits.sub_(kept_lse).exp_() @ value
        mass = -torch.expm1(kept_lse - lse).clamp(max=0).squeeze(-1)
        error = (output - kept).norm(dim=-1)
        # ||v_i - o_S||, from their product; rounding may leave its square below zero.
        length = kept.norm(dim=-1, keepdim=True)
        distance = (kept @ value.mT).mul_(-2).add_(norm).add_(length.square())
        bound = (lost.masked_fill_(~gone, 0.0) * distance.clamp_(min=0).sqrt_()).sum(-1)
        parts = (output.norm(dim=-1), mass, error, bound, mass * length.squeeze(-1))
        each_query = torch.stack(parts).unflatten(3, (groups, -1))
        found.append(each_query.masked_fill(~is_query[:, None, None], 0.0))
    each = torch.cat(found, dim=-1)  # [5, B, Hkv, groups, W]
    count = window.is_query.sum(-1).clamp(min=1) * num_heads
    lengths, mass, error, bound, kept_term = each.sum((2, 3, 4)) / count
    score = scores.masked_fill(~dropped, 0.0)
    mine = (layer.window_attention.mean(2) * layer.value_norm).masked_fill(~dropped, 0.0)
    return Measures(
        lengths,
        mass,
        each[1].amax((1, 2, 3)),
        error,
        bound,
        score.sum(-1).mean(-1),
        (mine - score).clamp(min=0).sum(-1).mean(-1),
        kept_term,
    )


@dataclass(frozen=True)
class Measured:
    """One layer's, still on its device."""

    measures: Measures
    own_scores: Tensor
    """bool [B]; rows that fell back."""
    has_terms: bool
    """Whether the scores are attention times value norm."""


def certify(layer: Measured) -> LayerCertificate:
    """Waits for the device."""
    measures = layer.measures
    scale = measures.output.clamp(min=1e-12)

    def share(x: Tensor) -> float:
        return (x / scale).max().item()

    terms = (measures.dropped_scores, measures.transfer, measures.kept)
    scores, transfer, kept = (share(x) if layer.has_terms else None for x in terms)
    return LayerCertificate(
        measures.dropped_mass.max().item(),
        measures.largest_dropped_mass.max().item(),
        share(measures.error),
        share(measures.bound),
        scores,
        transfer,
        kept,
        bool(layer.own_scores.any()),
    )
