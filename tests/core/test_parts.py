"""Properties of the stages, on random tensors of odd sizes."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from purekv.allocation import ALLOCATIONS
from purekv.budget import visual_budget
from purekv.cache import EvictingLayer
from purekv.layout import Layout, VisualSpan
from purekv.scoring.clie import default_source_layers
from purekv.selection import Selector
from purekv.window import Window, observation_window, window_attention


@st.composite
def layouts(draw):
    """Left-padded rows of text with one or two visual spans, or none in some rows."""
    rows = []
    for _ in range(draw(st.integers(1, 3))):
        parts = [("text", draw(st.integers(0, 5)))]
        for _ in range(draw(st.integers(0, 2))):
            parts.append(("visual", draw(st.integers(1, 9))))
            parts.append(("text", draw(st.integers(1, 4))))
        rows.append(parts)
    if not any(kind == "visual" for parts in rows for kind, _ in parts):
        rows[0] += [("visual", 4), ("text", 2)]
    seq_len = max(sum(size for _, size in parts) for parts in rows)
    is_token = torch.zeros(len(rows), seq_len, dtype=torch.bool)
    spans = []
    for row, parts in enumerate(rows):
        position = seq_len - sum(size for _, size in parts)
        is_token[row, position:] = True
        spans.append([])
        for kind, size in parts:
            if kind == "visual":
                spans[-1].append(VisualSpan(position, (1, 1, size), "image"))
            position += size
    return Layout.build(is_token, spans)


@given(layouts(), st.floats(0.01, 1.0), st.integers(0, 2**31), st.booleans())
@settings(max_examples=150, deadline=None)
def test_the_kept_set_is_the_top_k_and_all_text(layout, share, seed, ties):
    generator = torch.Generator().manual_seed(seed)
    batch, seq_len = layout.is_token.shape
    scores = torch.rand(batch, 2, seq_len, generator=generator)
    if ties:
        scores = (scores * 4).floor() - 2  # many equal, some negative, some minus zero
        scores[scores == 0] *= -1
    quota = [visual_budget(share, count) for count in layout.visual_tokens]
    selector = Selector(ALLOCATIONS["uniform"], layout.is_visual, layout.is_text, quota, 1, 2)
    selection = selector.select(0, scores)
    for row in range(batch):
        for head in range(2):
            index = selection.index[row, head]
            if selection.is_entry is not None:
                index = index[selection.is_entry[row]]
            visual = layout.is_visual[row].nonzero().flatten()
            best = scores[row, head, visual].argsort(descending=True, stable=True)[: quota[row]]
            text = layout.is_text[row].nonzero().flatten()
            assert index.tolist() == sorted(torch.cat([visual[best], text]).tolist())


@given(st.floats(0.001, 1.0), st.integers(1, 100_000))
def test_a_share_is_rounded_down_but_never_to_nothing(share, count):
    kept = visual_budget(share, count)
    assert 1 <= kept <= count
    assert kept == 1 or kept <= share * count + 1e-5
    assert visual_budget(1.0, count) == count


@given(layouts(), st.integers(1, 8), st.integers(1, 3), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_window_attention_equals_the_full_softmax_in_float64(layout, width, groups, seed):
    torch.manual_seed(seed)
    batch, seq_len = layout.is_token.shape
    query = torch.randn(batch, 2 * groups, seq_len, 4)
    key = torch.randn(batch, 2, seq_len, 4)
    window = observation_window(layout, width)
    ours = window_attention(query, key, 0.5, window, layout.is_token)
    logits = query.double() @ key.double().repeat_interleave(groups, 1).transpose(-1, -2) * 0.5
    visible = torch.ones(seq_len, seq_len).tril().bool() & layout.is_token[:, None, None]
    weights = logits.masked_fill(~visible, -1e300).softmax(-1)
    for row in range(batch):
        text = layout.is_text[row].nonzero().flatten()[-width:]
        if len(text):
            expected = weights[row, :, text].mean(1).view(2, groups, seq_len)
            torch.testing.assert_close(ours[row].double(), expected, rtol=1e-4, atol=1e-6)
        else:
            assert not ours[row].any()


def test_blocks_of_queries_change_nothing(monkeypatch):
    torch.manual_seed(0)
    query, key = torch.randn(2, 6, 33, 8), torch.randn(2, 3, 33, 8)
    window = Window(torch.arange(20, 33).repeat(2, 1), torch.ones(2, 13, dtype=torch.bool))
    is_token = torch.ones(2, 33, dtype=torch.bool)
    whole = window_attention(query, key, 0.3, window, is_token)
    monkeypatch.setattr("purekv.window.BLOCK_ELEMENTS", 2 * 6 * 33 * 3)
    torch.testing.assert_close(window_attention(query, key, 0.3, window, is_token), whole)


def test_the_question_is_all_text_behind_the_last_visual_token():
    is_token = torch.tensor([[True] * 10, [False] * 3 + [True] * 7])
    spans = [[VisualSpan(1, (1, 1, 2), "image"), VisualSpan(5, (1, 2, 1), "image")], []]
    window = observation_window(Layout.build(is_token, spans), "question")
    assert window.position.tolist() == [[7, 8, 9], [0, 0, 0]]
    assert window.is_query.tolist() == [[True] * 3, [False] * 3]


def test_default_sources_exist_and_ascend():
    for num_layers in range(1, 81):
        sources = default_source_layers(num_layers)
        assert sources == tuple(sorted(set(sources)))
        assert sources[0] >= 0
        assert sources[-1] < num_layers


def test_an_evicting_layer_keeps_two_lengths():
    layer = EvictingLayer()
    key = torch.randn(2, 1, 6, 4)
    layer.update(key, key)
    is_text = torch.tensor([[True, False, False, False, True, True], [False] * 4 + [True] * 2])
    visual = torch.tensor([[False, True, True, True, False, False]] * 2)
    selector = Selector(ALLOCATIONS["uniform"], visual, is_text, [1, 2], 1, 1)
    layer.evict(key, key, selector.select(0, torch.rand(2, 1, 6)), seen=6)
    assert (layer.get_seq_length(), layer.physical_length) == (6, 4)
    assert layer.get_mask_sizes(2) == (6, 2)
    assert layer.is_entry is None  # both rows keep four
    layer.update(key[:, :, :2], key[:, :, :2])
    layer.mark_padding(torch.tensor([[True, True], [False, True]]))
    assert layer.is_entry.tolist() == [[True] * 6, [True] * 4 + [False, True]]
    layer.reorder_cache(torch.tensor([1, 1]))
    assert layer.is_entry.tolist() == [[True] * 4 + [False, True]] * 2
    layer.crop(-1)
    assert (layer.get_seq_length(), layer.physical_length) == (7, 5)
    layer.crop(6)
    assert (layer.get_seq_length(), layer.physical_length) == (6, 4)
    layer.batch_repeat_interleave(2)
    assert layer.is_entry.shape == (4, 4)
    layer.reset()
    assert layer.get_seq_length() == 0
