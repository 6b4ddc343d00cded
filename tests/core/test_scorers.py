"""Each scorer against its formula on the full matrix, in float64."""

import pytest
import torch

from purekv import PureKVConfig
from purekv.layout import Layout, VisualSpan
from purekv.rotation import Rotation
from purekv.scoring import BEFORE_LAYERS, SCORERS, LayerInputs, accumulated, make_scorer
from purekv.window import observation_window

# Rows of (padding, text, visual tokens, text); odd lengths.
SHAPES = {
    "one": [(0, 3, 11, 5)],
    "padded": [(0, 4, 17, 6), (7, 2, 13, 5), (14, 1, 3, 9)],
}


def layer_inputs(shape: str, groups: int, seed: int = 0) -> LayerInputs:
    rows = SHAPES[shape]
    seq_len = sum(rows[0])
    is_token = torch.tensor([[i >= padding for i in range(seq_len)] for padding, *_ in rows])
    spans = [[VisualSpan(p + before, (1, 1, n), "image")] for p, before, n, _ in rows]
    layout = Layout.build(is_token, spans)
    generator = torch.Generator().manual_seed(seed)
    query = 3 * torch.randn(len(rows), 2 * groups, seq_len, 8, generator=generator)
    key, value = torch.randn(2, len(rows), 2, seq_len, 8, generator=generator)
    key += 0.5  # cosines to the mean of centred keys would be noise
    window = observation_window(layout, "question")
    no_turn = Rotation(*torch.zeros(3, 1, seq_len, 8), torch.nn.Identity())
    return LayerInputs(1, query, key, value, 0.3, layout=layout, window=window, rotation=no_turn)


def full_attention(layer: LayerInputs, row: int) -> torch.Tensor:
    """float64 [num_key_value_heads, groups, n, n] of the row's own n tokens, padding cut off."""
    own = layer.layout.is_token[row]
    query, key = layer.query[row, :, own].double(), layer.key[row, :, own].double()
    key = key.repeat_interleave(len(query) // len(key), dim=0)
    logits = query @ key.transpose(1, 2) * layer.scaling
    n = logits.shape[-1]
    logits[:, torch.ones(n, n).triu(1).bool()] = -torch.inf
    return logits.softmax(-1).unflatten(0, (2, -1))


def expected(name: str, layer: LayerInputs, row: int) -> torch.Tensor:
    """float64, broadcastable to [num_key_value_heads, n]."""
    own = layer.layout.is_token[row]
    key, value = layer.key[row, :, own].double(), layer.value[row, :, own].double()
    columns = full_attention(layer, row).mean(1).sum(1)
    if name == "h2o":
        return columns
    if name == "vatp":
        return columns * value.abs().sum(-1)
    if name == "key_diff":
        directions = key / key.norm(dim=-1, keepdim=True)
        return -torch.cosine_similarity(key, directions.mean(1, keepdim=True), dim=-1)
    visual = layer.layout.is_visual[row][own].nonzero().flatten().tolist()
    best_first = visual[:4] + visual[:3:-1]
    ranks = [-float(best_first.index(i)) if i in visual else 0.0 for i in range(len(own))]
    return torch.tensor(ranks).double()


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["h2o", "vatp", "key_diff"])
@pytest.mark.parametrize("block", [64, 5])
def test_a_scorer_equals_its_formula(name, shape, groups, block, monkeypatch):
    monkeypatch.setattr(accumulated, "BLOCK_QUERIES", block)
    layer = layer_inputs(shape, groups)
    score = make_scorer(name, "auto", 3).score(layer, None)
    assert score.dtype == torch.float32
    assert score.isfinite().all()
    for row, own in enumerate(layer.layout.is_token):
        torch.testing.assert_close(
            score[row, :, own].double(), expected(name, layer, row), atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("shape", SHAPES)
def test_streaming_ranks_sinks_then_the_newest(shape):
    layer = layer_inputs(shape, 1)
    score = make_scorer("streaming", "auto", 3).score(layer, None)
    for row, is_visual in enumerate(layer.layout.is_visual):
        visual = is_visual.nonzero().flatten().tolist()
        order = score[row, 0, visual].argsort(descending=True, stable=True).tolist()
        assert [visual[i] for i in order] == visual[:4] + visual[:3:-1]


def test_accumulated_attention_gives_padding_nothing_and_sums_to_the_tokens():
    layer = layer_inputs("padded", 3)
    total = layer.accumulated_attention
    is_token = layer.layout.is_token
    assert (total.masked_fill(is_token[:, None, None], 0.0) == 0).all()
    tokens = is_token.sum(-1)[:, None, None].expand(total.shape[:3])
    torch.testing.assert_close(total.sum(-1), tokens.float())


@pytest.mark.parametrize("name", SCORERS)
def test_every_registered_scorer_is_a_setting(name):
    evict = "drop" if name in BEFORE_LAYERS else "post"
    assert PureKVConfig(scorer=name, evict=evict).scorer == name
