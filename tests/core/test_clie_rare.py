"""`clie_rare` keeps the best of both lists, at any budget."""

import pytest
import torch

from purekv.scoring import make_scorer
from tests.core.test_scorers import SHAPES, layer_inputs


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", [2, 4, 6])
def test_half_of_the_places_go_to_each(shape, count):
    layer = layer_inputs(shape, 3)
    layer = type(layer)(**{**vars(layer), "layer_idx": 2})
    clie, mixed = (make_scorer(name, (0, 2), 3) for name in ("clie", "clie_rare"))
    assert [mixed.observes(i) for i in range(3)] == [clie.observes(i) for i in range(3)]
    observed = mixed.observe(layer)
    key_diff = make_scorer("key_diff", "auto", 3).score(layer, None)
    visual = layer.layout.is_visual[:, None]

    def best(score, k):
        return score.masked_fill(~visual, -torch.inf).topk(k, dim=-1).indices

    for both, one, other in zip(
        best(mixed.score(layer, observed), count).flatten(0, 1),
        best(clie.score(layer, observed), count // 2).flatten(0, 1),
        best(key_diff, count // 2).flatten(0, 1),
        strict=True,
    ):
        assert {*one.tolist(), *other.tolist()} <= set(both.tolist())
