"""Expected Attention against dense rotation matrices and the queries themselves, in float64."""

import pytest
import torch

from purekv import PureKV, PureKVConfig
from purekv.layout import Layout, VisualSpan
from purekv.rotation import Rotation
from purekv.scoring import LayerInputs
from purekv.scoring import expected_attention as module
from purekv.scoring.expected_attention import ExpectedAttention
from purekv.window import observation_window
from tests.core.prompts import prompt
from tests.tiny import tiny_model

HEAD_DIM = 16
SECTIONS = (2, 3, 3)  # of M-RoPE, as the tiny model has them
SCALING = 0.3
NUM_FUTURE, NUM_SINK = 7, 3


def angles(positions: torch.Tensor) -> torch.Tensor:
    """float64 [..., HEAD_DIM / 2] of (time, height, width) [..., 3]."""
    frequency = 10000.0 ** -(torch.arange(HEAD_DIM // 2).double() * 2 / HEAD_DIM)
    part = torch.tensor([place for place, size in enumerate(SECTIONS) for _ in range(size)])
    return positions.double()[..., part] * frequency


def matrix(positions: torch.Tensor) -> torch.Tensor:
    """Rotation matrices, float64 [..., HEAD_DIM, HEAD_DIM]: plane i is (i, i + HEAD_DIM / 2)."""
    angle, half = angles(positions), HEAD_DIM // 2
    turned = torch.zeros(*angle.shape[:-1], HEAD_DIM, HEAD_DIM, dtype=torch.float64)
    for i in range(half):
        turned[..., i, i] = turned[..., i + half, i + half] = angle[..., i].cos()
        turned[..., i + half, i] = angle[..., i].sin()
        turned[..., i, i + half] = -angle[..., i].sin()
    return turned


def expected(query, key, value, last, groups):
    """float64 [num_key_value_heads, n]: query [Hq, n, D] before rotation, key rotated, one row
    without padding whose largest position is `last`."""
    future = torch.arange(last + 1, last + 1 + NUM_FUTURE)[:, None].expand(-1, 3)
    mean_turn = matrix(future).mean(0)
    rows = []
    for kv_head in range(len(key)):
        weights = []
        for head in range(kv_head * groups, (kv_head + 1) * groups):
            own = query[head, NUM_SINK:]
            mu = mean_turn @ own.mean(0)
            sigma = mean_turn @ torch.cov(own.T, correction=0) @ mean_turn.T
            logits = torch.stack(
                [SCALING * k @ mu + SCALING**2 / 2 * k @ sigma @ k for k in key[kv_head, NUM_SINK:]]
            )
            weights.append(logits.softmax(0))
        score = torch.stack(weights).mean(0) * value[kv_head, NUM_SINK:].norm(dim=-1)
        rows.append(torch.cat([score.max().expand(NUM_SINK), score]))
    return torch.stack(rows)


@pytest.mark.parametrize("positions", ["text", "mrope"])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("paddings", [(0,), (0, 5, 13)], ids=str)
@pytest.mark.parametrize("block", [2**25, 100])
def test_it_equals_dense_matrices_of_every_row(paddings, groups, positions, block, monkeypatch):
    monkeypatch.setattr(module, "BLOCK_ELEMENTS", block)
    seq_len, batch = 33, len(paddings)
    generator = torch.Generator().manual_seed(0)
    is_token = torch.arange(seq_len) >= torch.tensor(paddings)[:, None]
    spans = [[VisualSpan(p + 5, (1, 2, 4), "image")] for p in paddings]
    layout = Layout.build(is_token, spans)
    if positions == "text":
        place = (is_token.cumsum(-1) - 1).clamp(min=1)[..., None].expand(-1, -1, 3)
    else:  # anything, and what lies on the padding is not looked at
        place = torch.randint(1, 40, (batch, seq_len, 3), generator=generator)
        place[~is_token] = 1
    plain = 2 * torch.randn(batch, 2 * groups, seq_len, HEAD_DIM, generator=generator).double() + 1
    query = (matrix(place)[:, None] @ plain[..., None]).squeeze(-1)
    key, value = torch.randn(2, batch, 2, seq_len, HEAD_DIM, generator=generator)
    query[(~is_token)[:, None].expand(query.shape[:3])] = 1e3  # must not enter the statistics
    rotary = tiny_model().model.language_model.rotary_emb
    position_ids = place.permute(2, 0, 1)
    rotation = Rotation(*rotary(key, position_ids), position_ids, rotary)
    window = observation_window(layout, "question")
    inputs = LayerInputs(
        0, query.float(), key, value, SCALING, layout=layout, window=window, rotation=rotation
    )
    score = ExpectedAttention(NUM_FUTURE, NUM_SINK).score(inputs, None)
    assert score.isfinite().all()
    for row, own in enumerate(is_token):
        theirs = expected(
            plain[row, :, own],
            key[row, :, own].double(),
            value[row, :, own].double(),
            int(place[row].max()),
            groups,
        )
        torch.testing.assert_close(score[row, :, own].double(), theirs, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_rotation_of_a_run_undoes_what_the_model_did(dtype, monkeypatch):
    """Queries as the layer's own projection makes them, M-RoPE and padding included."""
    model = tiny_model().to(dtype)
    inputs = prompt("mixed", 3)
    plain, undone = [], []
    for layer in model.model.language_model.layers:
        layer.self_attn.q_proj.register_forward_hook(lambda m, args, out: plain.append(out))
    score = ExpectedAttention.score

    def spy(self, layer, observed):
        undone.append(layer.rotation.undo(layer.query, slice(None)))
        return score(self, layer, observed)

    monkeypatch.setattr(ExpectedAttention, "score", spy)
    with PureKV(PureKVConfig(scorer="expected_attention"))(model), torch.no_grad():
        model(**inputs)
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0, "atol": 0.1}
    for ours, theirs in zip(undone, plain, strict=True):
        theirs = theirs.float().unflatten(-1, (4, HEAD_DIM)).transpose(1, 2)
        torch.testing.assert_close(ours, theirs, **tolerance)


def test_text_goes_on_from_the_largest_position():
    model = tiny_model()
    rotary = model.model.language_model.rotary_emb
    position_ids = torch.tensor([[[0, 1, 2, 3]], [[0, 1, 9, 4]], [[0, 1, 2, 3]]])  # [3, 1, 4]
    rotation = Rotation(*rotary(torch.zeros(1), position_ids), position_ids, rotary)
    cos, sin = rotation.following(2)
    places = torch.tensor([[10, 10, 10], [11, 11, 11]])
    torch.testing.assert_close(cos[0, :8].double(), angles(places).cos().mean(0), atol=1e-5, rtol=0)
    torch.testing.assert_close(sin[0, 8:].double(), angles(places).sin().mean(0), atol=1e-5, rtol=0)
