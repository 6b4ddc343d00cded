"""How well one layer's attention stands in for another's.

Shapes: L layers, G KV heads, V visual tokens.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def standard_ranks(x: Tensor) -> Tensor:
    """Ranks along the last dimension, mean 0 and variance 1; a product's mean is Spearman's rho."""
    ranks = x.argsort(-1).argsort(-1).float()
    ranks -= ranks.mean(-1, keepdim=True)
    return ranks / ranks.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-9)


def spearman(attention: Tensor) -> Tensor:
    """Rank correlation of every two layers' attention [L, V]: [L, L]."""
    ranks = standard_ranks(attention)
    return ranks @ ranks.T / ranks.shape[-1]


def best(score: Tensor, k: int) -> Tensor:
    """1/k at the k highest scores along the last dimension, 0 elsewhere."""
    return torch.zeros_like(score).scatter_(-1, score.topk(k, -1).indices, 1 / k)


def held(weight: Tensor, score: Tensor, k: int) -> Tensor:
    """[L]; the weight that falls on each head's k best-scored tokens, mean over heads.

    `weight` and `score` [L, G, V]. With `weight = best(own, k)` this is a recall.
    """
    return weight.gather(-1, score.topk(k, -1).indices).sum(-1).mean(-1)


def held_by_source(weight: Tensor, attention: Tensor, norm: Tensor, k: int) -> Tensor:
    """[L, L], source by target: `held` by CLIE's score of the target from each source.

    `weight` and `norm` (of the values) [L, G, V] are the targets', `attention` [L, V] the sources'.
    """
    return torch.stack([held(weight, source * norm, k) for source in attention])


def serving_layers(sources: Sequence[int], num_layers: int) -> list[int | None]:
    """The source that serves each layer: itself or the nearest below; None where there is none."""
    return [max((s for s in sources if s <= layer), default=None) for layer in range(num_layers)]
