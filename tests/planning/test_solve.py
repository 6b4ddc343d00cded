"""The solvers against every possible choice."""

from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from purekv.planning.solve import best_sources, enough_sources, spread


def random_errors(seed, num_layers):
    return torch.rand(num_layers, num_layers, generator=torch.Generator().manual_seed(seed)).triu()


def total(error, sources):
    serving = [max(s for s in sources if s <= layer) for layer in range(len(error))]
    return sum(float(error[source, layer]) for layer, source in enumerate(serving))


@given(st.integers(0, 999), st.integers(1, 7), st.data())
@settings(max_examples=60, deadline=None)
def test_no_other_sources_are_better(seed, num_layers, data):
    error = random_errors(seed, num_layers)
    count = data.draw(st.integers(1, num_layers))
    found = best_sources(error, count)
    assert found.source_layers[0] == 0
    assert len(found.source_layers) == count
    assert found.error == pytest.approx(total(error, found.source_layers), abs=1e-6)
    others = ((0, *rest) for rest in combinations(range(1, num_layers), count - 1))
    assert found.error <= min(total(error, sources) for sources in others) + 1e-6


def test_sources_are_as_few_as_the_slack_allows():
    error = torch.ones(6, 6).triu()
    error[0, 3:] = 5.0
    found, tried = enough_sources(error, 0.0, 6)
    assert found.source_layers == (0, 3) or found.error == 6
    assert [len(one.source_layers) for one in tried] == [1, 2]
    assert len(enough_sources(error, -1.0, 4)[1]) == 4


@given(st.integers(0, 999), st.floats(0.05, 0.5))
@settings(max_examples=40, deadline=None)
def test_a_spread_budget_adds_up_and_is_no_worse_than_an_even_one(seed, mean):
    budgets = [0.05, 0.1, 0.2, 0.5]
    generator = torch.Generator().manual_seed(seed)
    error = torch.rand(5, 4, generator=generator).sort(-1, descending=True).values
    given_ = spread(error, budgets, mean, least=0.0)
    assert sum(given_) / 5 == pytest.approx(mean)
    assert min(given_) >= 0


def test_the_layer_that_gains_most_gets_most():
    error = torch.tensor([[0.1, 0.1, 0.1], [5.0, 1.0, 0.5], [0.2, 0.1, 0.1]])
    assert spread(error, [0.05, 0.2, 0.4], 0.1, least=0.5) == pytest.approx([0.05, 0.2, 0.05])
