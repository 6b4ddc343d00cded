"""`evict="drop"`: a model that does not compute tokens answers as one forbidden to look at them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from purekv import PureKV, PureKVConfig, PureKVError
from purekv.cache import EvictingLayer
from purekv.dropping import Kept, stage_quotas
from purekv.prefill import Prefill
from tests.core.prompts import MODALITIES, prompt, prompt_of
from tests.core.test_eviction import reference_clie
from tests.core.twin import masked_attention
from tests.tiny import tiny_model

GREEDY = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}


class Record:
    """What a run computed and stored: for each layer, positions of the whole prompt."""

    def __init__(self) -> None:
        self.now: Kept | None = None
        self.computed: list[Kept | None] = []
        self.stored: list[tuple[Tensor, Tensor | None]] = []


@contextmanager
def recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[Record]:
    record = Record()
    drop, evict = Prefill.drop, EvictingLayer.evict

    def spy_drop(self: Prefill, scores: Tensor, quota: Any) -> None:
        drop(self, scores, quota)
        record.now = self.kept

    def spy_evict(self: EvictingLayer, key: Tensor, value: Tensor, selection: Any, seen: int):
        computed = record.computed[-1] if len(record.stored) < len(record.computed) else None
        index = selection.index
        if computed is not None:
            whole = computed.index[:, None].expand(-1, index.shape[1], -1)
            index = whole.gather(2, index)
        record.stored.append((index, selection.is_entry))
        evict(self, key, value, selection, seen)

    select = Prefill.select

    def spy_select(self: Prefill, *args: Any):
        record.computed.append(record.now)
        return select(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Prefill, "drop", spy_drop)
        patch.setattr(Prefill, "select", spy_select)
        patch.setattr(EvictingLayer, "evict", spy_evict)
        yield record


@contextmanager
def masked_twin(
    model: Any, inputs: dict[str, Tensor], record: Record, first_token: str
) -> Iterator[None]:
    """Within the block, `model` computes everything and looks only at what the run had."""
    ids, is_token = inputs["input_ids"], inputs["attention_mask"].bool()
    batch, seq_len = ids.shape
    is_visual = (ids == model.config.image_token_id) | (ids == model.config.video_token_id)
    is_tail = is_token & (is_visual.flip(-1).cumsum(-1).flip(-1) == 0)
    heads = model.config.text_config.num_key_value_heads

    def allowed(layer_idx: int, q_len: int, kv_len: int) -> Tensor:
        computed, (index, is_entry) = record.computed[layer_idx], record.stored[layer_idx]
        there = torch.ones(batch, kv_len, dtype=torch.bool)
        there[:, :seq_len] = is_token
        if computed is not None:
            chosen = torch.zeros(batch, seq_len, dtype=torch.bool)
            for row in range(batch):
                chosen[row, computed.index[row][computed.is_token[row]]] = True
            there[:, :seq_len] &= chosen
        stays = torch.zeros(batch, heads, kv_len, dtype=torch.bool)
        stays[..., seq_len:] = True
        for row in range(batch):
            for head in range(heads):
                positions = index[row, head]
                stays[row, head, positions if is_entry is None else positions[is_entry[row]]] = True
        stays[..., :seq_len] |= is_tail[:, None]
        sees_all = torch.zeros(batch, q_len, dtype=torch.bool)
        if q_len == kv_len:  # the prefill
            sees_all[:] = True if first_token == "exact" else ~is_tail
        return there[:, None, None] & (stays[:, :, None] | sees_all[:, None, :, None])

    with masked_attention(model, allowed):
        yield


SETTINGS = [
    {"scorer": "clie", "source_layers": (0,)},
    {"scorer": "clie", "source_layers": (0, 2)},
    {"scorer": "attention", "source_layers": (1,), "window": 1},
    {"scorer": "frame_difference"},
]


@pytest.mark.parametrize("first_token", ["exact", "compressed"])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("modality", MODALITIES)
def test_answers_equal_a_masked_twin(
    monkeypatch, modality, batch, attention, settings, first_token
):
    model = tiny_model()
    model.set_attn_implementation(attention)
    inputs = prompt(modality, batch)
    wanted = {**GREEDY, "output_logits": True, "return_dict_in_generate": True}
    config = PureKVConfig(budget=0.3, evict="drop", first_token=first_token, **settings)
    with recorded(monkeypatch) as record, PureKV(config)(model) as run:
        ours = model.generate(**inputs, **wanted)
        report = run.report
    with masked_twin(model, inputs, record, first_token):
        twin = model.generate(**inputs, **wanted)
    assert torch.equal(ours.sequences, twin.sequences)
    for ours_step, twin_step in zip(ours.logits, twin.logits, strict=True):
        torch.testing.assert_close(ours_step, twin_step, rtol=1e-3, atol=1e-4)
    assert report.computed_per_layer[-1] < inputs["input_ids"].shape[1]
    assert report.computed_per_layer == sorted(report.computed_per_layer, reverse=True)
    assert report.kv_bytes_kept < report.kv_bytes_full


@pytest.mark.parametrize(
    "decoding", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}]
)
@pytest.mark.parametrize("settings", SETTINGS[1:], ids=str)
def test_beams_equal_the_masked_twin(monkeypatch, settings, decoding):
    model = tiny_model()
    inputs = prompt("mixed", 3)
    beams = decoding["num_beams"]
    expanded = {
        name: inputs[name].repeat_interleave(beams, 0) for name in ("input_ids", "attention_mask")
    }
    with (
        recorded(monkeypatch) as record,
        PureKV(PureKVConfig(budget=0.3, evict="drop", **settings))(model),
    ):
        ours = model.generate(**inputs, **GREEDY, **decoding)
    with masked_twin(model, expanded, record, "exact"):
        assert torch.equal(model.generate(**inputs, **GREEDY, **decoding), ours)


@pytest.mark.parametrize("first_token", ["exact", "compressed"])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_padded_row_equals_the_row_alone(settings, first_token):
    model = tiny_model()
    config = PureKVConfig(budget=0.25, evict="drop", first_token=first_token, **settings)
    with PureKV(config)(model):
        together = model.generate(**prompt("mixed", 3), **GREEDY)
        for row in range(3):
            alone = model.generate(**prompt("mixed", rows=[row]), **GREEDY)
            assert torch.equal(alone[0, -8:], together[row, -8:])


# Batches whose longest row does not shrink, or not at every stage: the others move all the same.
STUBBORN = {
    "long text without pixels": [
        (0, [], "x" * 300), (1, [("video", 6, 32, 48)], "what?")
    ],
    "long text, one token of image": [
        (0, [("image", 16, 16)], "x" * 300), (1, [("video", 6, 32, 48)], "what?"),
    ],
    "stages that round to the same": [
        (0, [("image", 16, 32)], "x" * 300), (1, [("video", 6, 32, 48)], "and this one?"),
        (2, [("image", 16, 48)], "x"),
    ],
}  # fmt: skip


@pytest.mark.parametrize("first_token", ["exact", "compressed"])
@pytest.mark.parametrize("settings", [*SETTINGS, {"source_layers": (0, 1, 2)}], ids=str)
@pytest.mark.parametrize("rows", STUBBORN.values(), ids=STUBBORN)
def test_rows_that_shrink_beside_one_that_does_not(rows, settings, first_token):
    model = tiny_model()
    config = PureKVConfig(budget=0.25, evict="drop", first_token=first_token, **settings)
    wanted = {**GREEDY, "output_logits": True, "return_dict_in_generate": True}
    with PureKV(config)(model):
        together = model.generate(**prompt_of(rows), **wanted)
        for place, row in enumerate(rows):
            if not row[1]:
                continue  # alone, a prompt without pixels is refused
            alone = model.generate(**prompt_of([row]), **wanted)
            for ours, theirs in zip(together.logits, alone.logits, strict=True):
                torch.testing.assert_close(ours[place], theirs[0], rtol=1e-3, atol=1e-4)


def test_padding_on_the_right_is_refused():
    model = tiny_model()
    rows = [(0, [("video", 4, 32, 32)], "what?"), (1, [("video", 4, 32, 32)], "and who is it?")]
    inputs = prompt_of(rows, padding_side="right")
    for settings in SETTINGS:
        with (
            PureKV(PureKVConfig(evict="drop", **settings))(model),
            pytest.raises(PureKVError, match="pad on the left"),
        ):
            model(**inputs)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_second_turn_goes_on_where_the_first_ended(settings):
    """Two calls of generate, the cache handed on, answer as one longer call."""
    model = tiny_model()
    inputs = prompt("video", 1)
    config = PureKVConfig(budget=0.3, evict="drop", **settings)
    steps = {"do_sample": False, "return_dict_in_generate": True}
    with PureKV(config)(model):
        whole = model.generate(**inputs, **steps, max_new_tokens=8, min_new_tokens=8)
        half = model.generate(**inputs, **steps, max_new_tokens=4, min_new_tokens=4)
        rest = model.generate(
            input_ids=half.sequences, past_key_values=half.past_key_values, **steps,
            max_new_tokens=4, min_new_tokens=4,
        )  # fmt: skip
    assert torch.equal(rest.sequences, whole.sequences)


def test_clie_drops_by_the_mean_over_heads(monkeypatch):
    """The same top-k as a float64 reference on full attention matrices."""
    model = tiny_model()
    inputs = prompt("video", 3)
    _, full = reference_clie(model, inputs, (1,), 0.3)
    model.set_attn_implementation({"text_config": "eager"})
    with torch.no_grad():
        attention = model(**inputs, output_attentions=True).attentions[1].double()
    model.set_attn_implementation({"text_config": "sdpa"})
    with recorded(monkeypatch) as record, torch.no_grad():
        config = PureKVConfig(budget=0.3, evict="drop", source_layers=(1,))
        with PureKV(config)(model) as run:
            logits = model(**inputs).logits
    kept = record.computed[-1]
    assert kept is not None
    assert logits.shape[1] == kept.width == run.report.computed_per_layer[-1]
    ids = inputs["input_ids"]
    is_visual = (ids == model.config.image_token_id) | (ids == model.config.video_token_id)
    for row in range(3):
        visual = is_visual[row].nonzero().flatten()
        tail = slice(int(visual[-1]) + 1, None)
        norm = full.layers[1].values[row].double().norm(dim=-1).mean(0)
        score = (attention[row, :, tail].mean((0, 1)) * norm)[visual]
        count = max(1, int(0.3 * len(visual) + 1e-6))
        top = visual[score.argsort(descending=True, stable=True)[:count]]
        text = (inputs["attention_mask"][row].bool() & ~is_visual[row]).nonzero().flatten()
        expected = sorted(torch.cat([top, text]).tolist())
        assert kept.index[row][kept.is_token[row]].tolist() == expected


def test_frame_difference_against_a_plain_loop(monkeypatch):
    model = tiny_model()
    inputs = prompt("mixed", 1)
    seen = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    with torch.no_grad():
        model(**inputs)
    hook.remove()
    embeds = seen[0][0].double()
    config = PureKVConfig(budget=0.4, evict="drop", scorer="frame_difference")
    with recorded(monkeypatch) as record, torch.no_grad(), PureKV(config)(model):
        model(**inputs)
    ids = inputs["input_ids"][0]
    score = {}
    merge = model.config.vision_config.spatial_merge_size
    for name, token in (
        ("image_grid_thw", model.config.image_token_id),
        ("video_grid_thw", model.config.video_token_id),
    ):
        start = int((ids == token).nonzero()[0])
        t, h, w = inputs[name][0].tolist()
        h, w = h // merge, w // merge
        for k in range(t * h * w):
            frame, column = k // (h * w), k % w
            back = h * w if t > 1 else 1
            first = frame == 0 if t > 1 else column == 0
            a, b = embeds[start + k], embeds[start + k - back]
            score[start + k] = 4.0 if first else float(1 - a @ b / (a.norm() * b.norm()))
    order = sorted(score, key=lambda k: (-round(score[k], 5), k))
    kept = record.computed[0]
    assert kept is not None
    visual = [k for k in kept.index[0].tolist() if k in score]
    assert set(visual) == set(order[: int(0.4 * len(score) + 1e-6)])


def test_a_budget_of_everything_drops_nothing():
    model = tiny_model()
    inputs = prompt("mixed", 3)
    bare = model.generate(**inputs, **GREEDY)
    for settings in SETTINGS:
        with PureKV(PureKVConfig(budget=1.0, evict="drop", **settings))(model) as run:
            assert torch.equal(model.generate(**inputs, **GREEDY), bare)
            assert set(run.report.computed_per_layer) == {inputs["input_ids"].shape[1]}
    assert not any(layer._forward_pre_hooks for layer in model.model.language_model.layers)


@given(
    st.lists(st.tuples(st.integers(1, 5000), st.floats(0.001, 1.0)), min_size=1, max_size=4),
    st.integers(1, 6),
)
def test_stages_fall_to_the_quota(rows, stages):
    visual = [count for count, _ in rows]
    quota = [max(1, int(share * count)) for count, share in rows]
    counts = stage_quotas(visual, quota, stages)
    assert len(counts) == stages
    assert counts[-1] == quota
    for row, column in enumerate(zip(*counts, strict=True)):
        assert list(column) == sorted(column, reverse=True)
        assert visual[row] >= column[0]


@pytest.mark.parametrize(
    ("arguments", "names"),
    [({"labels": torch.zeros(1, 3)}, "labels"), ({"output_hidden_states": True}, "hidden_states")],
    ids=["labels", "hidden states"],
)
def test_what_needs_every_position_is_refused(arguments, names):
    model = tiny_model()
    with PureKV(PureKVConfig(evict="drop"))(model):
        with pytest.raises(PureKVError, match=names):
            model(**prompt(), **arguments)
        if names == "hidden_states":
            with pytest.raises(PureKVError, match=names):
                model.model(**prompt(), **arguments)


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"scorer": "snapkv", "evict": "drop"}, "clie, attention"),
        ({"scorer": "frame_difference"}, "evict='drop'"),
        ({"evict": "drop", "allocation": "ada"}, "allocation"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings, names):
    with pytest.raises(PureKVError, match=names):
        PureKVConfig(**settings)
