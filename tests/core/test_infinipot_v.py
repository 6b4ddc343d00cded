"""InfiniPot-V against loops over frames and places, in float64."""

import pytest
import torch

from purekv.layout import Layout, VisualSpan
from purekv.rotation import Rotation
from purekv.scoring import LayerInputs, make_scorer
from purekv.window import observation_window

NUM_LAYERS = 8

# Grids of each row, text of two tokens before each and three behind.
ROWS = {
    "video": [[(5, 3, 4)]],
    "long": [[(9, 1, 3)], [(4, 2, 2)]],
    "images": [[(1, 3, 5), (1, 8, 2)]],
    "mixed": [[(1, 3, 3), (7, 2, 3)], [(2, 3, 3)], [(1, 2, 2), (1, 1, 1), (6, 9, 1)]],
}


def layer_inputs(name: str, layer_idx: int, groups: int = 2) -> LayerInputs:
    rows = ROWS[name]
    lengths = [sum(2 + t * h * w for t, h, w in grids) + 3 for grids in rows]
    seq_len = max(lengths)
    spans, is_token = [], torch.zeros(len(rows), seq_len, dtype=torch.bool)
    for row, grids in enumerate(rows):
        position = seq_len - lengths[row]
        is_token[row, position:] = True
        spans.append([])
        for grid in grids:
            spans[row].append(VisualSpan(position + 2, grid, "video"))
            position += 2 + spans[row][-1].length
    layout = Layout.build(is_token, spans)
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(len(rows), 2 * groups, seq_len, 8, generator=generator)
    key, value = torch.randn(2, len(rows), 2, seq_len, 8, generator=generator)
    rotation = Rotation(*torch.zeros(3, 1, seq_len, 8), torch.nn.Identity())
    window = observation_window(layout, "question")
    return LayerInputs(
        layer_idx, query, key, value, 0.3, layout=layout, window=window, rotation=rotation
    )


def novelty(key, grid):
    """Minus the mean cosine to the same place of the recent frames, float64 [n]."""
    t, h, w = grid
    key = key.double().view(t, h * w, -1)
    recent = range(t - max(1, t // 4), t)
    scores = []
    for frame in range(t):
        for place in range(h * w):
            others = [f for f in recent if f != frame]
            cosines = [torch.cosine_similarity(key[frame, place], key[f, place], 0) for f in others]
            scores.append(-sum(cosines) / max(1, len(cosines)))
    return torch.tensor(scores, dtype=torch.float64)


def pooled_norm(value, grid, layer_idx):
    """Value norms averaged over the neighbours inside the frame, float64 [n]."""
    t, h, w = grid
    norm = value.double().norm(dim=-1)
    quarter = layer_idx // (NUM_LAYERS // 4)
    if quarter == 3:
        return norm
    if quarter == 2:
        return torch.stack([norm[max(0, i - 1) : i + 2].mean() for i in range(len(norm))])
    reach = 3 - quarter
    plane = norm.view(t, h, w)
    return torch.stack(
        [
            plane[f, max(0, y - reach) : y + reach + 1, max(0, x - reach) : x + reach + 1].mean()
            for f in range(t)
            for y in range(h)
            for x in range(w)
        ]
    )


def kept(layer, row, head, count):
    """Positions by the rule in words: walk down both lists, in step, until `count` are taken."""
    by_novelty, by_norm = [], []
    for span in layer.layout.spans[row]:
        part = slice(span.start, span.start + span.length)
        positions = range(span.start, span.start + span.length)
        norm = pooled_norm(layer.value[row, head, part], span.grid, layer.layer_idx)
        by_norm += zip(norm.tolist(), positions, strict=True)
        if span.grid[0] > 1:
            new = novelty(layer.key[row, head, part], span.grid)
            by_novelty += zip(new.tolist(), positions, strict=True)
    orders = [
        [position for _, position in sorted(pairs, key=lambda pair: (-round(pair[0], 9), pair[1]))]
        for pairs in (by_novelty, by_norm)
    ]
    taken: list[int] = []
    for place in range(len(by_norm)):
        step = sorted({order[place] for order in orders if place < len(order)} - set(taken))
        taken += step  # of two at the same place of both lists, the earlier position first
    return sorted(taken[:count])


@pytest.mark.parametrize("layer_idx", [0, 1, 3, 5, 7])
@pytest.mark.parametrize("name", ROWS)
def test_the_best_of_both_lists_are_kept(name, layer_idx):
    layer = layer_inputs(name, layer_idx)
    score = make_scorer("infinipot_v", "auto", NUM_LAYERS).score(layer, None)
    for row, visual in enumerate(layer.layout.is_visual):
        positions = visual.nonzero().flatten()
        assert score[row][:, visual].isfinite().all()
        for head in range(2):
            order = score[row, head, positions].argsort(descending=True, stable=True)
            for count in (1, 2, 5, len(positions) // 3, len(positions)):
                ours = sorted(positions[order[:count]].tolist())
                assert ours == kept(layer, row, head, count)


def test_a_still_video_keeps_its_long_values():
    """Every frame repeats the others: nothing is new, and the two lists start anywhere else."""
    layer = layer_inputs("video", 7)
    span = layer.layout.spans[0][0]
    part = slice(span.start, span.start + span.length)
    layer.key[0, :, part] = layer.key[0, :, part][:, :12].repeat(1, 5, 1)
    score = make_scorer("infinipot_v", "auto", NUM_LAYERS).score(layer, None)
    best = layer.value_norm[0, 0, part].argmax()
    assert best in score[0, 0, part].topk(2).indices
