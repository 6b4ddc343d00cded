"""Errors of choices against attention written out."""

import pytest
import torch
from torch import nn

from purekv import PureKV, PureKVConfig
from purekv.planning.measure import measure_transfer, measure_worth, output_errors
from purekv.scoring import Attended
from tests.core.prompts import prompt
from tests.tiny import tiny_model


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("bias", [False, True])
def test_output_errors_equal_their_definition(groups, bias):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 2 * groups, 9, 4, generator=generator)
    key, value = torch.randn(2, 1, 2, 9, 4, generator=generator)
    project = nn.Linear(2 * groups * 4, 5, bias=bias)
    queries = torch.tensor([6, 8])
    keep = torch.rand(3, 2, 9, generator=generator) < 0.5
    keep[..., 5:] = True
    with torch.no_grad():
        found = output_errors(Attended(0, query, key, value, 0.7), queries, keep, project)

        def outputs(kept):
            heads = []
            for head in range(2 * groups):
                logits = query[0, head, queries] @ key[0, head // groups].T * 0.7
                logits[0, 7:] = -torch.inf
                logits = logits.masked_fill(~kept[head // groups], -torch.inf)
                heads.append(logits.softmax(-1) @ value[0, head // groups])
            return project(torch.cat(heads, dim=-1))

        whole = outputs(torch.ones(2, 9, dtype=torch.bool))
        expected = torch.stack([(outputs(kept) - whole).norm(dim=-1) for kept in keep])
    torch.testing.assert_close(found, expected)


def test_more_is_better_and_the_own_source_is_on_the_diagonal():
    model = tiny_model()
    inputs = prompt("video")
    length = inputs["input_ids"].shape[1]
    found = measure_transfer(model, inputs, length - 6, 0.2, (0.1, 0.2, 0.9))
    assert found.pairs.shape == (2, 3, 3)
    assert found.curve.shape == (2, 3, 3)
    torch.testing.assert_close(found.pairs.diagonal(dim1=1, dim2=2), found.curve[:, 1])
    assert (found.pairs.tril(-1) == 0).all()
    assert (found.pairs + torch.ones(3, 3).tril(-1) > 0).all()
    assert (found.curve[:, 2] < found.curve[:, 0]).all()
    assert (found.curve[:, 0] < found.blind).all()


def test_a_layer_is_worth_what_the_answers_lose_without_it():
    model = tiny_model()
    inputs = prompt("video")
    first_turn = inputs["input_ids"].shape[1] - 6
    found = measure_worth(model, inputs, first_turn, rows=2)
    assert found.shape == (3,)
    with torch.no_grad():
        full = model(**inputs).logits.log_softmax(-1)[0, first_turn - 1 :]
    blind = [float(layer != 1) for layer in range(3)]
    shares = PureKVConfig(budget=2 / 3, layer_shares=tuple(blind), first_token="compressed")
    with torch.no_grad(), PureKV(shares)(model) as run:
        ours = model(**inputs).logits.log_softmax(-1)[0, first_turn - 1 :]
    assert run.report.kept_per_layer[1] == run.report.text_tokens[0]
    expected = (full.exp() * (full - ours)).sum(-1).mean()
    torch.testing.assert_close(found[1], expected, rtol=1e-3, atol=1e-6)
