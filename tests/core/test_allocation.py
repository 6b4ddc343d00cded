"""Allocations: exact totals, the papers' rules in plain Python, and bytes that are not padded."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from purekv import PureKV, PureKVConfig
from purekv.allocation import ALLOCATIONS, make_allocation
from purekv.cache import cache_bytes
from purekv.ragged import RaggedLayer
from purekv.selection import RaggedSelection, Selector
from tests.core.prompts import prompt
from tests.core.test_parts import layouts
from tests.core.twin import positions, recorded_selections
from tests.tiny import tiny_model

ada, pyramid = ALLOCATIONS["ada"], ALLOCATIONS["pyramid"]


@given(st.integers(1, 4000), st.integers(0, 4000), st.integers(1, 80))
@settings(max_examples=300, deadline=None)
def test_a_pyramid_has_the_uniform_total_and_falls_linearly(quota, spare, num_layers):
    evictable = quota + spare
    counts = pyramid.layer_quotas(quota, evictable, num_layers)
    assert sum(counts) == num_layers * quota
    assert all(1 <= count <= evictable for count in counts)
    assert counts == sorted(counts, reverse=True)
    last = max(quota / 20, 2 * quota - evictable, 1)
    for layer, count in enumerate(counts if num_layers > 1 else []):
        ideal = 2 * quota - last - 2 * (quota - last) * layer / (num_layers - 1)
        assert abs(count - ideal) < 1 + 1e-6
    assert pyramid.layer_quotas(0, 0, num_layers) == [0] * num_layers
    assert pyramid.layer_quotas(evictable, evictable, num_layers) == [evictable] * num_layers


@given(
    st.integers(1, 4000),
    st.integers(0, 4000),
    st.lists(st.floats(0, 9).filter(lambda x: x == 0 or x > 0.01), min_size=1, max_size=40),
)
@settings(max_examples=200, deadline=None)
def test_layer_shares_keep_the_total_and_the_proportion(quota, spare, shares):
    if not any(shares):
        shares[0] = 1.0
    evictable, used = quota + spare, [share for share in shares if share]
    counts = make_allocation("uniform", tuple(shares)).layer_quotas(quota, evictable, len(shares))
    assert sum(counts) == min(quota * len(shares), evictable * len(used))
    assert all(0 <= count <= evictable for count in counts)
    assert all(count == 0 for count, share in zip(counts, shares, strict=True) if not share)
    scale = {  # of those that are not full, one number but for rounding
        count / share: 1 / share
        for count, share in zip(counts, shares, strict=True)
        if share and count < evictable
    }
    assert not scale or max(scale) - min(scale) <= 2 * max(scale.values())


def test_shared_layers_hold_what_they_are_given():
    model = tiny_model()
    config = PureKVConfig(budget=0.3, layer_shares=(1.0, 0.0, 2.0))
    with torch.no_grad(), PureKV(config)(model) as run:
        model(**prompt("video"))
    text = run.report.text_tokens[0]
    visual = [kept - text for kept in run.report.kept_per_layer]
    assert visual[1] == 0
    assert sum(visual) == 3 * run.report.kept_visual_tokens[0]
    assert abs(visual[2] - 2 * visual[0]) <= 2


def reference_ada(scores, evictable, quota):
    """Positions [head] of one row: scores float64 [H, S], a floor each, then the best of all."""
    candidates = [
        (-float(scores[head, position]), int(position), head)
        for head in range(len(scores))
        for position in evictable.nonzero().flatten()
    ]
    kept: list[tuple[float, int, int]] = []
    for head in range(len(scores)):
        own = sorted(candidate for candidate in candidates if candidate[2] == head)
        kept += own[: quota * 2 // 10]
    rest = sorted(set(candidates) - set(kept))
    kept += rest[: len(scores) * quota - len(kept)]
    return [[position for _, position, h in kept if h == head] for head in range(len(scores))]


@given(layouts(), st.integers(1, 3), st.floats(0.01, 1.0), st.integers(0, 2**31), st.booleans())
@settings(max_examples=200, deadline=None)
def test_ada_keeps_what_the_papers_algorithm_keeps(layout, num_heads, share, seed, ties):
    generator = torch.Generator().manual_seed(seed)
    batch, seq_len = layout.is_token.shape
    scores = torch.rand(batch, num_heads, seq_len, generator=generator)
    scores *= 3 ** torch.arange(num_heads)[:, None]  # heads that differ in scale
    if ties:
        scores = scores.floor() - 1
        scores[scores == 0] *= -1
    quota = [max(1, int(share * n)) if n else 0 for n in layout.visual_tokens]
    selector = Selector(ada, layout.is_visual, layout.is_text, quota, 1, num_heads)
    selection = selector.select(0, scores)
    assert isinstance(selection, RaggedSelection)
    text = layout.is_text.sum(-1)
    assert selection.length.sum(-1).tolist() == [
        num_heads * (count + int(n)) for count, n in zip(quota, text, strict=True)
    ]
    for row, heads in enumerate(positions(selection, seq_len)):
        expected = reference_ada(scores[row].double(), layout.is_visual[row], quota[row])
        always = layout.is_text[row].nonzero().flatten().tolist()
        for ours, theirs in zip(heads, expected, strict=True):
            assert ours.tolist() == sorted(theirs + always)


@pytest.mark.parametrize("name", ["streaming"])
def test_scores_that_heads_share_make_ada_uniform(name, monkeypatch):
    kept = []
    for allocation in ("uniform", "ada"):
        config = PureKVConfig(budget=0.3, scorer=name, allocation=allocation)
        model = tiny_model()
        with recorded_selections(monkeypatch) as layers, PureKV(config)(model), torch.no_grad():
            model(**prompt("mixed", 3))
        kept.append([[[head.tolist() for head in row] for row in layer] for layer in layers])
    assert kept[0] == kept[1]


@pytest.mark.parametrize("scorer", ["clie", "value_norm", "random"])
@pytest.mark.parametrize("budget", [0.1, 0.3, 0.7, 4])
@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_totals_and_text_in_every_row(allocation, budget, scorer, monkeypatch):
    model = tiny_model(num_hidden_layers=4)
    inputs = prompt("mixed", 3)
    ids = inputs["input_ids"]
    is_visual = (ids == model.config.image_token_id) | (ids == model.config.video_token_id)
    is_text = inputs["attention_mask"].bool() & ~is_visual
    config = PureKVConfig(budget=budget, scorer=scorer, allocation=allocation)
    with recorded_selections(monkeypatch) as kept, PureKV(config)(model) as run, torch.no_grad():
        model(**inputs)
    for row in range(3):
        visual = [[int(is_visual[row, head].sum()) for head in layer[row]] for layer in kept]
        assert sum(map(sum, visual)) == 4 * 2 * run.report.kept_visual_tokens[row]
        if allocation != "pyramid":
            assert {sum(heads) for heads in visual} == {2 * run.report.kept_visual_tokens[row]}
        for layer in kept:
            for head in layer[row]:
                assert head.tolist() == sorted(set(head.tolist()))
                assert int(is_text[row, head].sum()) == int(is_text[row].sum())
                assert inputs["attention_mask"][row, head].all()


@pytest.mark.parametrize("first_token", ["exact", "compressed"])
@pytest.mark.parametrize("batch", [1, 3])
def test_stored_bytes(batch, first_token):
    model = tiny_model()
    inputs = prompt("mixed", batch)
    reports = {}
    for allocation in ALLOCATIONS:
        cache = DynamicCache()
        config = PureKVConfig(budget=0.2, allocation=allocation, first_token=first_token)
        with PureKV(config)(model) as run, torch.no_grad():
            model(**inputs, past_key_values=cache)
        reports[allocation] = report = run.report
        stored = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
            for layer in cache.layers
            for tensor in layer.tensors
        }
        assert report.kv_bytes_kept == cache_bytes(cache) == sum(stored.values())
        assert report.kv_bytes_kept < report.kv_bytes_full
    uniform, ragged, slope = (reports[name] for name in ("uniform", "ada", "pyramid"))
    entry = 2 * 2 * 16 * 4  # key and value of two heads, float32
    # A ragged layer knows where its heads are, and stores no padding of shorter rows.
    assert ragged.kv_bytes_kept <= uniform.kv_bytes_kept + 3 * batch * entry
    if batch == 1:
        assert abs(ragged.kv_bytes_kept - uniform.kv_bytes_kept) <= 3 * entry
        assert slope.kv_bytes_kept == uniform.kv_bytes_kept
    assert ragged.kept_per_layer == uniform.kept_per_layer == uniform.longest_head_per_layer
    assert slope.kept_per_layer == slope.longest_head_per_layer
    assert slope.kept_per_layer[0] > slope.kept_per_layer[-1]
    assert all(
        longest >= kept
        for longest, kept in zip(ragged.longest_head_per_layer, ragged.kept_per_layer, strict=True)
    )
    assert ragged.longest_head_per_layer != ragged.kept_per_layer


@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("first_token", ["exact", "compressed"])
@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_a_cropped_cache_is_the_one_before(allocation, first_token, batch, absolute):
    """Back to the prompt, and one token into it, from an answer that nobody wants."""
    model = tiny_model()
    inputs = prompt("mixed", batch)
    seen = inputs["input_ids"].shape[1]
    greedy = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    config = PureKVConfig(budget=0.3, allocation=allocation, first_token=first_token)

    def again(cache, length):
        for layer in cache.layers:
            layer.crop(length if absolute else length - layer.get_seq_length())
        assert cache.get_seq_length() == length
        ids = inputs["input_ids"] if length < seen else torch.full((batch, seen + 1), 9)
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, ids.shape[1] - seen), value=1)
        output = model.generate(input_ids=ids, attention_mask=mask, past_key_values=cache, **greedy)
        return output[:, ids.shape[1] :]

    with PureKV(config)(model), torch.no_grad():
        first = model.generate(**inputs, **greedy, return_dict_in_generate=True)
        cache = first.past_key_values
        fresh = model(**inputs).past_key_values
        assert torch.equal(again(cache, seen), again(fresh, seen))
        last = again(cache, seen - 1)
    if first_token == "compressed":  # what the last token of the prompt answered at first
        assert torch.equal(last, first.sequences[:, seen:])


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("update"), st.integers(1, 3)),
        st.tuples(st.just("crop"), st.integers(1, 6)),
        st.tuples(st.just("reorder"), st.integers(0, 2**31)),
        st.tuples(st.just("repeat"), st.integers(1, 2)),
        st.tuples(st.just("select"), st.integers(0, 2**31)),
        st.tuples(st.just("pad"), st.integers(0, 2**31)),
    ),
    max_size=7,
)


@given(layouts(), STEPS, st.integers(0, 2**31))
@settings(max_examples=150, deadline=None)
def test_a_ragged_layer_equals_lists_of_entries(layout, steps, seed):
    """Whatever is done to it, each head sees the entries that a plain list of them would have."""
    generator = torch.Generator().manual_seed(seed)
    batch, seq_len = layout.is_token.shape
    key = torch.randn(batch, 2, seq_len, 3, generator=generator)
    value = torch.randn(batch, 2, seq_len, 5, generator=generator)
    quota = [(n + 1) // 2 for n in layout.visual_tokens]
    selector = Selector(ada, layout.is_visual, layout.is_text, quota, 1, 2)
    selection = selector.select(0, torch.rand(batch, 2, seq_len, generator=generator))
    layer = RaggedLayer()
    layer.update(key, value)
    layer.evict(key, value, selection, seen=seq_len)
    kept = positions(selection, seq_len)
    # Of each row and head: (key, value, whether it is real).
    lists = [
        [[(key[row, h, i], value[row, h, i], True) for i in kept[row][h]] for h in range(2)]
        for row in range(batch)
    ]
    seen, later = seq_len, 0
    for step, number in [*steps, ("update", 1)]:
        picks = torch.Generator().manual_seed(number)
        if step == "update":
            new_key = torch.randn(len(lists), 2, number, 3, generator=picks)
            new_value = torch.randn(len(lists), 2, number, 5, generator=picks)
            keys, values = layer.update(new_key, new_value)
            for row, heads in enumerate(lists):
                for h, entries in enumerate(heads):
                    entries += [
                        (new_key[row, h, i], new_value[row, h, i], True) for i in range(number)
                    ]
            seen, later = seen + number, later + number
            is_entry = layer.is_entry
            for row, heads in enumerate(lists):
                for h, entries in enumerate(heads):
                    real = [entry for entry in entries if entry[2]]
                    assert int(is_entry[row, h].sum()) == len(real)
                    if real:
                        assert torch.equal(
                            keys[row, h, is_entry[row, h]], torch.stack([e[0] for e in real])
                        )
                        assert torch.equal(
                            values[row, h, is_entry[row, h]], torch.stack([e[1] for e in real])
                        )
        elif step == "crop":
            number = min(number, *(len(entries) for heads in lists for entries in heads))
            if number:
                layer.crop(-number)
                lists = [[entries[: len(entries) - number] for entries in row] for row in lists]
                seen, later = seen - number, max(0, later - number)
        elif step == "repeat":
            layer.batch_repeat_interleave(number)
            lists = [[list(h) for h in row] for row in lists for _ in range(number)]
        elif step in ("reorder", "select"):
            rows = torch.randint(0, len(lists), (len(lists),), generator=picks)
            method = layer.reorder_cache if step == "reorder" else layer.batch_select_indices
            method(rows)
            lists = [[list(h) for h in lists[row]] for row in rows]
        elif later:
            is_token = torch.rand(len(lists), later, generator=picks) > 0.3
            layer.mark_padding(is_token)
            for row, heads in enumerate(lists):
                for entries in heads:
                    for back in range(1, later + 1):
                        entries[-back] = (*entries[-back][:2], bool(is_token[row, -back]))
        assert layer.get_seq_length() == seen
        assert layer.dense_length == later
        widest = max(len(entries) for heads in lists for entries in heads)
        assert layer.physical_length >= widest
    layer.reset()
    assert layer.get_seq_length() == 0
    keys, _ = layer.update(key, value)
    assert torch.equal(keys, key)
