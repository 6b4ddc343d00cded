"""From the measured errors of each choice to the plan that costs the least.

Shapes: L layers, N budgets.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sources:
    """Which layers observe, and what that costs."""

    source_layers: tuple[int, ...]
    error: float
    """Sum over layers."""


def best_sources(error: Tensor, count: int) -> Sources:
    """Exactly the best `count` source layers, by dynamic programming over contiguous blocks.

    The first is layer 0: it is evicted before any other layer runs, so it observes in any case.

    Args:
        error: [L, L], source by target: of a layer served by a source at or below it.
        count: of source layers, up to L.
    """
    num_layers = len(error)
    above = torch.ones(num_layers, num_layers, dtype=torch.bool).triu()
    served = error.double().masked_fill(~above, 0.0).cumsum(1).tolist()  # [s][h]: of s .. h
    # least[s]: error of the layers below s, where s is the k-th source.
    least = [0.0] + [math.inf] * (num_layers - 1)
    back: list[list[int]] = []
    for _ in range(count - 1):
        choices = [
            min(((least[t] + served[t][s - 1], t) for t in range(s)), default=(math.inf, -1))
            for s in range(num_layers)
        ]
        least = [cost for cost, _ in choices]
        back.append([t for _, t in choices])
    total, last = min((least[s] + served[s][-1], s) for s in range(num_layers))
    chosen = [last]
    for step in reversed(back):
        chosen.append(step[chosen[-1]])
    return Sources(tuple(reversed(chosen)), total)


def enough_sources(error: Tensor, slack: float, most: int) -> tuple[Sources, list[Sources]]:
    """The fewest source layers whose error is within `slack` of every layer's own, or `most`; and
    the best of each count up to there."""
    limit = float(error.diagonal().sum()) * (1 + slack)
    tried: list[Sources] = []
    for count in range(1, min(most, len(error)) + 1):
        tried.append(best_sources(error, count))
        if tried[-1].error <= limit:
            break
    return tried[-1], tried


def spread(
    error: Tensor, budgets: Sequence[float], mean: float, least: float = 0.25
) -> list[float]:
    """A budget for each layer, `mean` on average, that makes the sum of errors least.

    Greedy along the convex hulls of the layers' curves: each step takes the one that lowers the
    error most for what it keeps. That is the best plan at every budget at which a step ends; in
    between, the last step is taken in part, so that it stays within that one step of the best.

    Args:
        error: [L, N] at each budget, ascending ones below 1.
        mean: of the budgets that are given out.
        least: what every layer gets, as a share of `mean`: errors on calibration samples are not
            all that a layer is for.
    """
    num_layers = len(error)
    floor = least * mean
    given = [floor] * num_layers
    left = (mean - floor) * num_layers
    steps = []
    for layer, curve in enumerate(error.double()):
        points = [(b, float(e)) for b, e in zip(budgets, curve, strict=True)]
        points.append((1.0, 0.0))  # what keeps everything loses nothing
        start = _at(points, floor)
        hull = _lower_hull([(floor, start), *((b, e) for b, e in points if b > floor)])
        steps += [((e0 - e1) / (b1 - b0), layer, b1 - b0) for (b0, e0), (b1, e1) in pairwise(hull)]
    for gain, layer, size in sorted(steps, key=lambda step: -step[0]):
        if gain <= 0 or left <= 0:
            break
        taken = min(size, left)
        given[layer] += taken
        left -= taken
    if left > 0:  # nothing gains any more: all alike
        given = [one + left / num_layers for one in given]
    return given


def _at(points: Sequence[tuple[float, float]], where: float) -> float:
    """A curve's value, linear between points and constant beyond them."""
    if where <= points[0][0]:
        return points[0][1]
    for (b0, e0), (b1, e1) in pairwise(points):
        if where <= b1:
            return e0 + (e1 - e0) * (where - b0) / (b1 - b0)
    return points[-1][1]


def _lower_hull(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    hull: list[tuple[float, float]] = []
    for b, e in points:
        while len(hull) >= 2:
            (b0, e0), (b1, e1) = hull[-2:]
            if (e1 - e0) * (b - b0) < (e - e0) * (b1 - b0):
                break
            hull.pop()
        hull.append((b, e))
    return hull
