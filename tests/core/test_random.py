"""Random eviction is a floor only if it is random: not the same places for all, nor by batch."""

import pytest
import torch

from purekv.layout import Layout, VisualSpan
from purekv.scoring.base import Attended
from purekv.scoring.random import Random
from purekv.window import observation_window

ROWS = [
    (3, [(2, 3, 4)], 5),
    (2, [(4, 3, 4)], 4),
    (2, [(1, 5, 5), (3, 2, 2)], 7),
    (4, [(2, 4, 3)], 5),
]
HEADS = 2


def layout_of(rows, padding_side="left"):
    """Rows of text before, the grids of their spans, text behind."""
    lengths = [before + sum(t * h * w for t, h, w in grids) + n for before, grids, n in rows]
    is_token = torch.zeros(len(rows), max(lengths), dtype=torch.bool)
    spans = []
    for row, ((before, grids, _), length) in enumerate(zip(rows, lengths, strict=True)):
        start = max(lengths) - length if padding_side == "left" else 0
        is_token[row, start : start + length] = True
        start += before
        spans.append([])
        for grid in grids:
            spans[-1].append(VisualSpan(start, grid, "video"))
            start += spans[-1][-1].length
    return Layout.build(is_token, spans)


def scores(rows, layer=0, padding_side="left", seed=0):
    """Those of each row's tokens, [heads, tokens]."""
    layout = layout_of(rows, padding_side)
    value = torch.zeros(len(rows), HEADS, layout.is_token.shape[1], 4)
    attended = Attended(layer, value, value, value, 1.0)
    window = observation_window(layout, "question")
    inputs = attended.for_scorers(layout, window, None)
    found = Random(seed).score(inputs, None)
    return [one[:, tokens] for one, tokens in zip(found, layout.is_token, strict=True)]


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_a_row_draws_in_a_batch_what_it_draws_alone(padding_side):
    together = scores(ROWS, 1, padding_side)
    for row, found in zip(ROWS, together, strict=True):
        assert torch.equal(found, scores([row], 1)[0])
    backwards = scores(ROWS[::-1], 1, padding_side)[::-1]
    assert all(map(torch.equal, together, backwards))


def test_draws_are_of_their_own():
    drawn = [scores([row], layer)[0] for row in ROWS for layer in (0, 1)]
    drawn.append(scores([ROWS[0]], seed=1)[0])
    firsts = [tuple(head[:5].tolist()) for one in drawn for head in one]
    assert len(set(firsts)) == len(firsts)
    assert all(one.min() >= 0 and one.max() < 1 for one in drawn)
