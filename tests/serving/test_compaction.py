"""What one layer keeps, against the scorers of a run and plain top-k."""

import pytest
import torch

from purekv.scoring import make_scorer
from purekv.serving.compaction import Compaction
from purekv.serving.hole import Hole
from purekv.serving.requests import Request

N, B, BLOCK, WINDOW, SINKS = 100, 36, 16, 8, 4
HOLE = Hole(N, B, BLOCK)


def states(heads: int, length: int, seed: int) -> torch.Tensor:
    return torch.randn(length, heads, 16, generator=torch.Generator().manual_seed(seed))


def keep(scorer: str, request: Request) -> torch.Tensor:
    compaction = Compaction(request, HOLE, WINDOW, SINKS)
    query = states(4, N, 0)[compaction.window_start :]
    return compaction.keep(
        make_scorer(scorer, (0,), 2), 0, query, states(2, N, 1), states(2, N, 2), 0.25, lambda x: x
    )


@pytest.mark.parametrize("scorer", ["clie", "attention", "snapkv", "value_norm", "key_diff"])
def test_sinks_and_window_stay_and_positions_ascend(scorer):
    kept = keep(scorer, Request(N))
    assert kept.shape == (2, B)
    assert (kept.diff(dim=-1) > 0).all()
    for head in kept.tolist():
        assert {*range(SINKS), *range(N - WINDOW, N)} <= set(head)


def test_the_longest_values_stay():
    norm = states(2, N, 2).norm(dim=-1).T
    norm[:, :SINKS] = norm[:, -WINDOW:] = torch.inf
    assert torch.equal(keep("value_norm", Request(N)), norm.topk(B).indices.sort().values)


def test_text_goes_before_video_and_observes_behind_it():
    request = Request(N, spans=((10, 70),))
    assert Compaction(request, HOLE, WINDOW, SINKS).window_start == 80
    for head in keep("clie", request).tolist():
        assert {*range(10), *range(80, N)} <= set(head)


def test_text_beyond_the_budget_competes():
    kept = keep("clie", Request(N, spans=((40, 10),)))
    for head in kept.tolist():
        assert {*range(SINKS), *range(N - WINDOW, N)} <= set(head)
