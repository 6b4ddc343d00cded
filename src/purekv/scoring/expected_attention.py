"""Expected Attention (arXiv:2510.00636, section 3): what queries still to come will look at."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from purekv.rotation import turn
from purekv.scoring.base import LayerInputs
from purekv.window import BLOCK_ELEMENTS


@dataclass(frozen=True)
class ExpectedAttention:
    """Attention that a Gaussian of future queries pays, weighted by the L2 norm of each value.

    A head's queries before rotation get the mean mu and covariance S of the prompt's. Rotated by
    R, the mean rotation of the next `num_future` positions, they give a key k the logit
    `scaling * k.R mu + scaling^2 / 2 * k.(R S R^T) k`, the logarithm of its expected weight; the
    softmax of these is averaged over the query heads of a KV group. The first `num_sink` tokens of
    a row count neither as queries nor as keys; they get the largest score.

    Where we differ: the statistics are of the projected queries themselves and not of hidden
    states sent through the query's weights, so that biases and norms of queries count; padding is
    left out of them; the maximum that sinks get is their own head's.
    """

    num_future: int = 512
    num_sink: int = 4

    def observes(self, layer_idx: int) -> bool:
        return False

    def observe(self, layer: LayerInputs) -> Tensor:
        raise NotImplementedError

    def score(self, layer: LayerInputs, observed: Tensor | None) -> Tensor:
        is_token = layer.layout.is_token
        is_sink = (is_token.cumsum(-1) <= self.num_sink) & is_token
        counts = is_token & ~is_sink
        logits = self._logits(layer, counts).masked_fill(~counts[:, None, None], -torch.inf)
        score = logits.softmax(-1).mean(2) * layer.value_norm
        return torch.where(is_sink[:, None], score.amax(-1, keepdim=True), score)

    def _logits(self, layer: LayerInputs, counts: Tensor) -> Tensor:
        """float32 [B, num_key_value_heads, groups, S]; `counts` is bool [B, S]."""
        batch, num_heads, seq_len, head_dim = layer.query.shape
        num_kv_heads = layer.key.shape[1]
        mean, covariance = _statistics(layer, counts)
        cos, sin = layer.rotation.following(self.num_future)
        cos, sin = cos[:, None], sin[:, None]  # [B or 1, 1, D]
        mean = turn(mean, cos, sin) * layer.scaling  # [B, num_attention_heads, D]
        cos, sin = cos[:, None], sin[:, None]
        covariance = turn(turn(covariance, cos, sin).mT, cos, sin) * (layer.scaling**2 / 2)
        mean = mean.view(batch, num_kv_heads, -1, head_dim, 1)
        covariance = covariance.view(batch, num_kv_heads, -1, head_dim, head_dim)
        logits = []
        for part in _blocks(batch * num_heads * head_dim, seq_len):
            key = layer.key[:, :, None, part].float()  # [B, Hkv, 1, n, D]
            logits.append((key @ mean).squeeze(-1) + (key @ covariance).mul_(key).sum(-1))
        return torch.cat(logits, dim=-1)


def _statistics(layer: LayerInputs, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [B, num_attention_heads, D] and covariance [B, num_attention_heads, D, D], float32, of
    the queries before rotation at the positions in `counts` [B, S]."""
    batch, num_heads, seq_len, head_dim = layer.query.shape
    weight = counts[:, None, :, None].float()  # [B, 1, S, 1]
    number = weight.sum(2).clamp(min=1)  # [B, 1, 1]
    blocks = list(_blocks(batch * num_heads * head_dim, seq_len))

    def queries(part: slice) -> Tensor:
        return layer.rotation.undo(layer.query[:, :, part], part)

    mean = layer.query.new_zeros(batch, num_heads, head_dim, dtype=torch.float32)
    for part in blocks:
        mean += (queries(part) * weight[:, :, part]).sum(2)
    mean /= number
    covariance = mean.new_zeros(batch, num_heads, head_dim, head_dim)
    for part in blocks:
        centred = (queries(part) - mean[:, :, None]) * weight[:, :, part]
        covariance += centred.mT @ centred
    return mean, covariance / number[..., None]


def _blocks(elements: int, seq_len: int) -> Iterator[slice]:
    """Parts of the positions; `elements` is the size of one position."""
    step = max(1, BLOCK_ELEMENTS // elements)
    for start in range(0, seq_len, step):
        yield slice(start, start + step)
