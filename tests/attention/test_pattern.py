"""The pattern against its definition in words, and its execution against its mask in float64."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from purekv import PureKVError
from purekv.attention import partial
from purekv.attention.partial import Partial, attend, plain_attention
from purekv.attention.pattern import Pattern, row_patterns
from purekv.attention.spatiotemporal import sparse_attention
from purekv.layout import Layout, VisualSpan
from tests.attention.reference import masked_attention


@dataclass(frozen=True)
class Case:
    """A row of a batch, and how it is attended to."""

    padding: tuple[int, int]
    spans: tuple[VisualSpan, ...]
    length: int
    tile: int
    anchors: int
    band: int

    def layout(self) -> Layout:
        is_token = torch.ones(1, self.length, dtype=torch.bool)
        is_token[0, : self.padding[0]] = False
        is_token[0, self.length - self.padding[1] :] = False
        return Layout.build(is_token, [self.spans])

    def pattern(self) -> Pattern:
        return row_patterns(self.layout(), self.tile, self.anchors, 1, self.band)[0]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Up to three videos and images of odd sizes, text before, between and within some."""
    small = st.integers(1, 5)
    padding = draw(st.sampled_from([(0, 0), (3, 0), (0, 2)]))
    position = padding[0]
    spans = []
    for _ in range(draw(st.integers(1, 3))):
        position += draw(st.integers(0, 3))
        height, width = draw(small), draw(small)
        if draw(st.booleans()):
            pieces = [(1, height * 2, width)]
            kind = "image"
        else:
            kind = "video"
            pieces = [(t, height, width) for t in draw(st.lists(small, min_size=1, max_size=3))]
        for number, grid in enumerate(pieces):
            if number:
                position += draw(st.integers(0, 2))  # a time stamp
            spans.append(VisualSpan(position, grid, kind, continues=number > 0))
            position += spans[-1].length
    length = position + draw(st.integers(0, 4)) + padding[1]
    settings = draw(st.integers(1, 3)), draw(st.integers(0, 2)), draw(st.sampled_from([4, 9, 100]))
    return Case(padding, tuple(spans), length, *settings)


def in_words(case: Case) -> torch.Tensor:
    """bool [S, S], query by query and key by key."""
    places: dict[int, tuple[int, int, int, int] | None] = {}  # medium, frame, row and column
    anchors = set()
    medium = frame = -1
    for span in case.spans:
        if not span.continues:
            medium, frame = medium + 1, 0
        time, height, width = span.grid
        band = max(1, case.band // width)
        bands = max(0, height // band - 1)
        head = height - bands * band
        for t in range(time):
            for y in range(height):
                for x in range(width):
                    position = span.start + (t * height + y) * width + x
                    if span.modality == "image":
                        below = y - head
                        places[position] = medium, below // band, below % band, x
                        is_anchor = y < head
                    else:
                        places[position] = medium, frame, y, x
                        is_anchor = frame < case.anchors
                    if is_anchor:
                        anchors.add(position)
            frame += 1
    tokens = range(case.padding[0], case.length - case.padding[1])
    seen = torch.zeros(case.length, case.length, dtype=torch.bool)
    for q in tokens:
        for k in range(tokens.start, q + 1):
            if q not in places or k not in places or k in anchors:
                seen[q, k] = True
            elif q not in anchors and places[q][0] == places[k][0]:
                same_tile = all(
                    a // case.tile == b // case.tile
                    for a, b in zip(places[q][2:], places[k][2:], strict=True)
                )
                seen[q, k] = places[q][1] == places[k][1] or same_tile
    return seen


@settings(max_examples=60, deadline=None)
@given(cases())
def test_the_mask_says_what_the_words_say(case):
    pattern = case.pattern()
    mask = pattern.visible(torch.arange(case.length), case.length)
    assert torch.equal(mask, in_words(case))
    assert int(mask.sum()) == pattern.pairs()


@settings(max_examples=120, deadline=None)
@given(cases(), st.integers(1, 2), st.sampled_from([1, 3]), st.integers(0, 2**16))
def test_passes_add_up_to_the_masked_attention(case, num_kv_heads, groups, seed):
    generator = torch.Generator().manual_seed(seed)

    def states(heads: int) -> torch.Tensor:
        x = torch.randn(2, case.length, heads, 8, generator=generator, dtype=torch.float64)
        return x.transpose(1, 2)

    query, key, value = states(num_kv_heads * groups), states(num_kv_heads), states(num_kv_heads)
    patterns = [case.pattern(), Pattern(case.pattern().tokens)]  # the other row is dense
    for chosen in (patterns, patterns[:1] * 2):
        expected = masked_attention(query, key, value, 0.5, chosen)
        exact = sparse_attention(query, key, value, 0.5, chosen)
        torch.testing.assert_close(exact, expected, rtol=1e-9, atol=1e-10)
        single = sparse_attention(query.float(), key.float(), value.float(), 0.5, chosen)
        torch.testing.assert_close(single.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tile", [1, 2, 3])
def test_half_precision_errs_as_dense_attention_does(tile):
    spans = [VisualSpan(5, (9, 6, 7), "video")]
    layout = Layout.build(torch.ones(1, 400, dtype=torch.bool), [spans])
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, heads, 400, 32).bfloat16() for heads in (4, 2, 2))

    def error(pattern: Pattern) -> float:
        ours = sparse_attention(query, key, value, 0.2, [pattern])
        return float((ours - masked_attention(query, key, value, 0.2, [pattern])).abs().max())

    sparse, dense = row_patterns(layout, tile, 1, 1)[0], Pattern((0, 400))
    assert error(sparse) <= 1.5 * error(dense)


@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize("keys", [8, 20, 24, 37])
def test_few_queries_over_many_keys_are_split(monkeypatch, queries, keys):
    monkeypatch.setattr(partial, "CHUNK", 5)
    torch.manual_seed(0)
    query, key, value = torch.randn(1, 6, queries, 8), *torch.randn(2, 1, 2, keys, 8)
    found, plain = attend(query, key, value, 0.3), plain_attention(query, key, value, 0.3)
    for ours, theirs in zip(vars(found).values(), vars(plain).values(), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("causal", [False, True])
def test_plain_operations_equal_the_kernel(monkeypatch, causal):
    monkeypatch.setattr(partial, "BLOCK_ELEMENTS", 500)  # several blocks of queries
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 6, 11, 8), *torch.randn(2, 2, 3, 11, 8)
    visible = torch.ones(11, 11, dtype=torch.bool).tril() if causal else None
    found = attend(query, key, value, 0.3, causal)
    plain: Partial = plain_attention(query, key, value, 0.3, visible)
    torch.testing.assert_close(found.out, plain.out)
    torch.testing.assert_close(found.lse, plain.lse)


def test_small_prompts_and_small_images_stay_dense():
    spans = [VisualSpan(2, (1, 5, 4), "image"), VisualSpan(30, (3, 4, 4), "video")]
    layout = Layout.build(torch.ones(1, 90, dtype=torch.bool), [spans])
    assert row_patterns(layout, 2, 1, min_tokens=69)[0] == Pattern((0, 90))
    assert len(row_patterns(layout, 2, 1, min_tokens=68)[0].clips) == 1
    assert row_patterns(layout, 2, 3, min_tokens=1)[0] == Pattern((0, 90))  # all is anchor


def test_padding_between_tokens_is_refused():
    is_token = torch.ones(1, 9, dtype=torch.bool)
    is_token[0, 3] = False
    layout = Layout.build(is_token, [[VisualSpan(4, (1, 2, 2), "video")]])
    with pytest.raises(PureKVError, match="pad on one side"):
        row_patterns(layout, 2, 1, 1)
