"""PureKV on VideoLLaMA2: layouts, identity at full budget, eviction, sparse prefill, padding."""

import time

import pytest
import torch
from torch import Tensor

from purekv import PureKV, PureKVConfig, PureKVError, SpatioTemporalConfig
from purekv.attention.pattern import row_patterns
from purekv.families import for_config
from tests.videollama2 import checkpoints
from tests.videollama2.checkpoints import KINDS

GREEDY = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
LOGITS = {**GREEDY, "output_logits": True, "return_dict_in_generate": True}
SPARSE = {
    "prefill": "spatiotemporal",
    "spatiotemporal": SpatioTemporalConfig(tile=1, min_tokens=0),
}


def prompt(name: str, rows: tuple[int, ...] = (0, 1, 2), frames: int = 6) -> dict[str, Tensor]:
    """A left-padded batch of these rows, whose texts differ in length."""
    kind, generator = KINDS[name], torch.Generator().manual_seed(7)
    size = (3, frames, 3, kind.image_size, kind.image_size)
    pixels = torch.randn(size, generator=generator)
    audio = 15 + 6 * torch.randn(3, 100, 128, generator=generator)
    texts = [[5, -201, 17, 40], [5, 9, 11, -201, 17, 40, 41, 42], [8, -201, 90, 33, 71]]
    width = max(len(texts[row]) for row in rows)
    padded = [[0] * (width - len(texts[row])) + texts[row] for row in rows]
    ids = torch.tensor(padded)
    made = {
        "input_ids": ids,
        "attention_mask": (ids != 0).long(),
        "pixel_values_videos": pixels[list(rows)],
    }
    return {**made, "audio_values": audio[list(rows)]} if kind.audio else made


def layout_of(model, inputs):
    return for_config(model.config).layout(model.config, inputs)


@pytest.mark.parametrize("name", ["mistral", "qwen2", "av"])
def test_layout(model, name):
    layout = layout_of(model(name), prompt(name))
    grid = (4, 4, 4) if name == "mistral" else (3, 3, 3)
    visual = grid[0] * grid[1] * grid[2]
    grids = [("video", grid)] + ([("audio", (1, 6, 8))] if name == "av" else [])
    tokens = visual + (48 if name == "av" else 0)
    assert layout.visual_tokens == (tokens,) * 3
    assert layout.text_tokens == (3, 7, 4)
    assert layout.trailing_text == 2 or layout.trailing_text == 4
    for row, starts in zip(layout.spans, (5, 3, 4), strict=True):
        assert [(span.modality, span.grid) for span in row] == grids
        assert row[0].start == starts
        if name == "av":
            assert row[1].start == starts + visual


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("rows", [(0,), (0, 1, 2)], ids=["one", "padded"])
@pytest.mark.parametrize("name", KINDS)
def test_the_whole_budget_changes_nothing(model, name, rows, attention):
    ours, inputs = model(name), prompt(name, rows)
    ours.set_attn_implementation(attention)
    bare = ours.generate(**inputs, **GREEDY)
    with PureKV(PureKVConfig(budget=1.0))(ours) as run:
        assert torch.equal(ours.generate(**inputs, **GREEDY), bare)
        assert run.report.kept_visual_tokens == run.report.visual_tokens
    assert torch.equal(ours.generate(**inputs, **GREEDY), bare)
    ours.set_attn_implementation("sdpa")


SETTINGS = [
    {},
    {"scorer": "snapkv"},
    SPARSE,
    {"evict": "active", "source_layers": (0,), **SPARSE},
    {"evict": "drop", "source_layers": (0,)},
    {"first_token": "compressed"},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("name", ["mistral", "mixtral", "qwen2", "av"])
def test_a_padded_row_equals_the_row_alone_and_bytes_fall(model, name, settings):
    ours = model(name)
    with PureKV(PureKVConfig(budget=0.2, **settings))(ours) as run:
        together = ours.generate(**prompt(name), **GREEDY)
        report = run.report
        for row in range(3):
            alone = ours.generate(**prompt(name, (row,)), **GREEDY)
            assert torch.equal(alone[0, -6:], together[row, -6:])
            single = run.report
            entries = single.text_tokens[0] + single.kept_visual_tokens[0]
            assert single.kept_visual_tokens[0] == pytest.approx(
                0.2 * single.visual_tokens[0], abs=1
            )
            head_dim = checkpoints.HIDDEN // checkpoints.HEADS
            one = checkpoints.LAYERS * 2 * checkpoints.KV_HEADS * head_dim * 4
            assert single.kv_bytes_kept == entries * one
    assert report.kv_bytes_kept < 0.4 * report.kv_bytes_full
    if "prefill" in settings:
        assert report.prefill_per_layer[0] == "spatiotemporal"


def masked(visible: Tensor):
    """An attention function that sees where `visible` [B, S, S] says, in prefills."""

    def attention(module, query, key, value, mask, scaling=None, **kwargs):
        groups = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
        there = None
        if query.shape[2] > 1:
            there = visible[:, None]
        output = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=there, scale=scaling
        )
        return output.transpose(1, 2).contiguous(), None

    return attention


@pytest.mark.parametrize("name", ["mistral", "av"])
def test_a_sparse_prefill_equals_the_masked_model(model, name):
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ours, inputs = model(name), prompt(name, (1,))
    layout = layout_of(ours, inputs)
    pattern = row_patterns(layout, 1, SPARSE["spatiotemporal"].anchor_frames, 0)[0]
    seq_len = layout.is_token.shape[1]
    visible = pattern.visible(torch.arange(seq_len), seq_len)[None]
    assert int(visible.sum()) < seq_len * (seq_len + 1) // 2
    if name == "av":  # audio sees all before it
        audio = layout.spans[0][1]
        assert visible[0, audio.start + audio.length - 1].sum() == audio.start + audio.length - 18
    with PureKV(PureKVConfig(budget=1.0, **SPARSE))(ours):
        sparse = ours.generate(**inputs, **LOGITS)
    ALL_ATTENTION_FUNCTIONS["masked_twin"] = masked(visible)
    ours.model.config._attn_implementation = "masked_twin"
    try:
        twin = ours.generate(**inputs, **LOGITS)
    finally:
        ours.model.config._attn_implementation = "sdpa"
        del ALL_ATTENTION_FUNCTIONS["masked_twin"]
    torch.testing.assert_close(sparse.logits[0], twin.logits[0], rtol=1e-3, atol=1e-4)
    assert torch.equal(sparse.sequences, twin.sequences)


def test_a_plain_forward_is_compressed_too(model):
    ours, inputs = model("av"), prompt("av")
    with PureKV(PureKVConfig(budget=0.2))(ours) as run, torch.no_grad():
        ours(**inputs)
        forward = run.report.kv_bytes_kept
        ours.generate(**inputs, max_new_tokens=1)
        assert run.report.kv_bytes_kept == forward
        assert run.report.seconds["vision"] > 0


def test_towers_and_connectors_count_as_vision(model):
    """Also where `generate` runs them before the model."""
    ours, inputs = model("av"), prompt("av")
    parts = ("vision_tower", "mm_projector", "audio_tower", "mm_projector_a")

    def dawdle(module, args, output):
        time.sleep(0.05)

    hooks = [getattr(ours.model, part).register_forward_hook(dawdle) for part in parts]
    with PureKV(PureKVConfig(budget=0.2))(ours) as run:
        ours.generate(**inputs, max_new_tokens=1)
        encoded = run.report.seconds["vision"]
        with torch.no_grad():
            ours(**inputs)
        assert min(encoded, run.report.seconds["vision"]) > 0.2
    for hook in hooks:
        hook.remove()


def test_a_second_turn_goes_on_where_the_first_ended(model):
    """With expanded ids, as the processor makes them."""
    from purekv.families.videollama2.placeholders import expand

    ours, inputs = model("mistral"), prompt("mistral", (1,))
    pixels = {"pixel_values_videos": inputs["pixel_values_videos"]}
    ids, _ = expand(ours.config, inputs["input_ids"], None, pixels)
    steps = {"do_sample": False, "return_dict_in_generate": True}
    with PureKV(PureKVConfig(budget=0.3))(ours):
        whole = ours.generate(input_ids=ids, **pixels, **steps, max_new_tokens=8, min_new_tokens=8)
        half = ours.generate(input_ids=ids, **pixels, **steps, max_new_tokens=4, min_new_tokens=4)
        cache = getattr(half, "cache", None) or half.past_key_values
        name = "cache" if "cache" in half else "past_key_values"
        rest = ours.generate(
            input_ids=half.sequences, **{name: cache}, **steps, max_new_tokens=4, min_new_tokens=4
        )
        assert torch.equal(rest.sequences, whole.sequences)
        with pytest.raises(PureKVError, match="processor's ids"):
            ours.generate(input_ids=inputs["input_ids"], **{name: rest[name]}, **steps)
        with pytest.raises(PureKVError, match="follow-up turn"):
            ours(input_ids=ids[:, :1], **pixels, **{name: rest[name]})
