"""`prefill="spatiotemporal"` and `evict="active"`: answers equal those of a masked model."""

import contextlib

import pytest
import torch
from transformers import DynamicCache

from purekv import PureKV, PureKVConfig, PureKVError, SpatioTemporalConfig
from purekv.attention.pattern import row_patterns
from purekv.layout import Layout
from tests.core.prompts import MODALITIES, prompt, prompt_of
from tests.core.twin import masked_attention, recorded_selections, twin_attention
from tests.tiny import tiny_model

GREEDY = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
LOGITS = {**GREEDY, "output_logits": True, "return_dict_in_generate": True}
SMALL = SpatioTemporalConfig(min_tokens=0)


def layout_of(model, inputs) -> Layout:
    from purekv.families import for_config

    return for_config(model.config).layout(model.config, inputs)


@contextlib.contextmanager
def sparse_twin(model, inputs, sparse: SpatioTemporalConfig, layers):
    """Within the block, `model` attends by the pattern's mask in the prefill of these layers."""
    layout = layout_of(model, inputs)
    patterns = row_patterns(layout, sparse.tile, sparse.anchor_frames, sparse.min_tokens)
    seq_len = layout.is_token.shape[1]
    visible = torch.stack([p.visible(torch.arange(seq_len), seq_len) for p in patterns])
    heads = model.config.text_config.num_key_value_heads
    visible = visible[:, None].expand(-1, heads, -1, -1)

    def allowed(layer_idx: int, q_len: int, kv_len: int) -> torch.Tensor:
        if q_len == kv_len and layer_idx in layers:
            return visible
        there = torch.ones(len(patterns), kv_len, dtype=torch.bool)
        there[:, :seq_len] = layout.is_token
        return there[:, None, None].expand(-1, heads, -1, -1)

    with masked_attention(model, allowed):
        yield


def assert_equal_answers(ours, theirs):
    assert torch.equal(ours.sequences, theirs.sequences)
    for step, other in zip(ours.logits, theirs.logits, strict=True):
        torch.testing.assert_close(step, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("modality", MODALITIES)
def test_sparse_answers_equal_the_masked_model(modality, batch, attention):
    model = tiny_model()
    model.set_attn_implementation(attention)
    inputs = prompt(modality, batch)
    for sparse, layers in (
        (SMALL, (0, 1, 2)),
        (SpatioTemporalConfig(1, 0, dense_layers=1, min_tokens=0), (1, 2)),
        (SpatioTemporalConfig(3, 2, dense_layers=(1,), min_tokens=0), (0, 2)),
    ):
        config = PureKVConfig(budget=1.0, prefill="spatiotemporal", spatiotemporal=sparse)
        with PureKV(config)(model) as run:
            ours = model.generate(**inputs, **LOGITS)
            kinds = run.report.prefill_per_layer
        with sparse_twin(model, inputs, sparse, layers):
            assert_equal_answers(ours, model.generate(**inputs, **LOGITS))
        expected = layers if "image" not in modality else ()  # small images are all anchor
        assert kinds == ["spatiotemporal" if n in expected else "dense" for n in range(3)]


EVICTION = [
    {"evict": "post"},
    {"evict": "active"},
    {"evict": "drop"},
    {"evict": "post", "allocation": "ada"},
    {"evict": "active", "allocation": "pyramid"},
    {"evict": "drop", "scorer": "frame_difference"},
    {"evict": "active", "scorer": "snapkv"},
]


@pytest.mark.parametrize("decoding", [{}, {"num_beams": 2}], ids=str)
@pytest.mark.parametrize("first_token", ["exact", "compressed"])
@pytest.mark.parametrize("prefill", ["dense", "spatiotemporal"])
@pytest.mark.parametrize("settings", EVICTION, ids=str)
def test_a_padded_row_equals_the_row_alone(settings, prefill, first_token, decoding):
    model = tiny_model()
    config = PureKVConfig(
        budget=0.3, prefill=prefill, spatiotemporal=SMALL, first_token=first_token, **settings
    )
    with PureKV(config)(model):
        together = model.generate(**prompt("mixed", 3), **GREEDY, **decoding)
        for row in range(3):
            alone = model.generate(**prompt("mixed", rows=[row]), **GREEDY, **decoding)
            assert torch.equal(alone[0, -8:], together[row, -8:])


def test_rows_below_the_limit_stay_dense_beside_others():
    model = tiny_model()
    rows = [
        (0, [("video", 4, 32, 32)], "who?"),
        (1, [("video", 8, 48, 32)], "and this one?"),
        (2, [("image", 16, 16)], "what is it that one sees here?"),
    ]
    inputs, small = prompt_of(rows), prompt_of(rows[:1])
    sparse = SpatioTemporalConfig(min_tokens=24)
    assert layout_of(model, inputs).visual_tokens == (8, 24, 1)
    config = PureKVConfig(budget=1.0, prefill="spatiotemporal", spatiotemporal=sparse)
    with PureKV(config)(model) as run:
        ours = model.generate(**inputs, **LOGITS)
        assert set(run.report.prefill_per_layer) == {"spatiotemporal"}
        dense = model.generate(**small, **LOGITS)
        assert set(run.report.prefill_per_layer) == {"dense"}
    with sparse_twin(model, inputs, sparse, (0, 1, 2)):
        assert_equal_answers(ours, model.generate(**inputs, **LOGITS))
    assert_equal_answers(dense, model.generate(**small, **LOGITS))


@pytest.mark.parametrize("first_token", ["exact", "compressed"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    "settings",
    [
        {"source_layers": (0,)},
        {"source_layers": (0, 2)},
        {"source_layers": (1,), "allocation": "pyramid"},
        {"scorer": "snapkv"},
        {"scorer": "key_diff"},
    ],
    ids=str,
)
def test_active_layers_see_what_they_keep(monkeypatch, settings, batch, attention, first_token):
    model = tiny_model()
    model.set_attn_implementation(attention)
    inputs = prompt("mixed", batch)
    config = PureKVConfig(budget=0.3, evict="active", first_token=first_token, **settings)
    with recorded_selections(monkeypatch) as kept, PureKV(config)(model) as run:
        ours = model.generate(**inputs, **LOGITS)
        kinds = run.report.prefill_per_layer
    sources = settings.get("source_layers", ())
    first = sources[0] if sources else -1
    assert kinds == ["kept" if n > first and n not in sources else "dense" for n in range(3)]
    active = {n for n, kind in enumerate(kinds) if kind == "kept"}
    with twin_attention(model, inputs, kept, first_token, active):
        assert_equal_answers(ours, model.generate(**inputs, **LOGITS))


@pytest.mark.parametrize("evict", ["post", "active"])
def test_a_second_turn_goes_on_where_the_first_ended(evict):
    model = tiny_model()
    inputs = prompt("video", 1)
    config = PureKVConfig(budget=0.3, evict=evict, prefill="spatiotemporal", spatiotemporal=SMALL)
    steps = {"do_sample": False, "return_dict_in_generate": True}
    with PureKV(config)(model):
        whole = model.generate(**inputs, **steps, max_new_tokens=8, min_new_tokens=8)
        half = model.generate(**inputs, **steps, max_new_tokens=4, min_new_tokens=4)
        rest = model.generate(
            input_ids=half.sequences, past_key_values=half.past_key_values, **steps,
            max_new_tokens=4, min_new_tokens=4,
        )  # fmt: skip
    assert torch.equal(rest.sequences, whole.sequences)


def test_active_with_the_whole_budget_changes_nothing():
    model = tiny_model()
    inputs = prompt("mixed", 3)
    bare = model.generate(**inputs, **GREEDY)
    with PureKV(PureKVConfig(budget=1.0, evict="active"))(model) as run:
        assert torch.equal(model.generate(**inputs, **GREEDY), bare)
        assert run.report.prefill_per_layer == ["dense"] * 3


def test_layers_above_a_drop_are_dense():
    model = tiny_model()
    config = PureKVConfig(
        budget=0.3, evict="drop", source_layers=(1,), prefill="spatiotemporal",
        spatiotemporal=SMALL,
    )  # fmt: skip
    with PureKV(config)(model) as run:
        model.generate(**prompt("video"), max_new_tokens=2)
    assert run.report.prefill_per_layer == ["spatiotemporal", "spatiotemporal", "dense"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("evict", ["post", "active"])
def test_half_precision_runs(evict, dtype):
    model = tiny_model().to(dtype)
    config = PureKVConfig(
        budget=0.2, evict=evict, prefill="spatiotemporal", spatiotemporal=SMALL,
        first_token="compressed",
    )  # fmt: skip
    with PureKV(config)(model) as run:
        model.generate(**prompt("mixed", 3), **GREEDY)
    assert run.report.kv_bytes_kept < run.report.kv_bytes_full


def test_after_the_block_the_model_is_as_before():
    model = tiny_model()
    inputs = prompt("video", 3)
    bare = model.generate(**inputs, **GREEDY)
    config = PureKVConfig(prefill="spatiotemporal", spatiotemporal=SMALL, evict="active")
    with PureKV(config)(model):
        model.generate(**inputs, **GREEDY)
    assert torch.equal(model.generate(**inputs, **GREEDY), bare)


def test_a_gradient_is_refused():
    model = tiny_model()
    config = PureKVConfig(prefill="spatiotemporal", spatiotemporal=SMALL)
    with PureKV(config)(model), pytest.raises(PureKVError, match="no_grad"):
        model(**prompt("video"), past_key_values=DynamicCache())


def test_settings_survive_json():
    sparse = SpatioTemporalConfig(3, 2, (0, 4), 100)
    config = PureKVConfig(prefill="spatiotemporal", spatiotemporal=sparse)
    assert PureKVConfig.from_json(config.to_json()) == config
    assert PureKVConfig.from_dict({"spatiotemporal": {"tile": 4}}).spatiotemporal.tile == 4
    with pytest.raises(PureKVError, match="unknown setting 'tiles'"):
        PureKVConfig.from_dict({"spatiotemporal": {"tiles": 4}})


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda: SpatioTemporalConfig(tile=0), "1 or more"),
        (lambda: SpatioTemporalConfig(anchor_frames=-1), "0 or more"),
        (lambda: SpatioTemporalConfig(min_tokens=0.5), "whole number"),
        (lambda: SpatioTemporalConfig(dense_layers=(0, -1)), "layer numbers"),
        (lambda: PureKVConfig(spatiotemporal="tile"), "SpatioTemporalConfig"),
        (lambda: PureKVConfig(evict="active", allocation="ada"), "uniform"),
        (
            lambda: PureKV(PureKVConfig(spatiotemporal=SpatioTemporalConfig(dense_layers=(9,))))(
                tiny_model()
            ),
            "0 to 2",
        ),
    ],
)
def test_a_bad_setting_names_the_fix(make, names):
    with pytest.raises(PureKVError, match=names):
        make()
