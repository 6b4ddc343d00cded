"""Every family: family x what it shows x attention x batch x scorer x prefill, on tiny models."""

from functools import cache
from typing import Any

import pytest
import torch

from purekv import PureKV, PureKVConfig, PureKVError, SpatioTemporalConfig
from purekv.attention.pattern import row_patterns
from purekv.families import FAMILIES, Family
from purekv.layout import Layout
from tests.core.twin import recorded_selections, twin_attention
from tests.families.zoo import AUDIO, CLOSE, END, IMAGE, MARK, SHOWS, START, VIDEO, ZOO

STEPS = 3
GREEDY = {"max_new_tokens": STEPS, "do_sample": False}
LOGITS = {**GREEDY, "output_logits": True, "return_dict_in_generate": True}
PLACEHOLDERS = torch.tensor([IMAGE, VIDEO, AUDIO])
SMALL = SpatioTemporalConfig(tile=1, anchor_frames=1, min_tokens=0)

CASES = [
    pytest.param(name, shows, attention, id=f"{name}-{shows}-{attention}")
    for name, zoo in ZOO.items()
    for shows, items in SHOWS.items()
    if shows not in zoo.without and set(items) <= set(zoo.items)
    for attention in ("sdpa", "eager")
]


def is_rare(shows: str, attention: str, scorer: str, prefill: str) -> bool:
    """Combinations that run with -m slow only."""
    often = shows in ("video", "mixed") and (scorer == "clie") == (prefill == "dense")
    return attention == "eager" and not often


MATRIX = [
    pytest.param(
        *case.values,
        scorer,
        prefill,
        id=f"{case.id}-{scorer}-{prefill}",
        marks=[pytest.mark.slow] * is_rare(*case.values[1:], scorer, prefill),
    )
    for case in CASES
    for scorer in ("clie", "snapkv")
    for prefill in ("dense", "spatiotemporal")
    if prefill == "dense" or FAMILIES[case.values[0]].sparse
]


@cache
def model_of(name: str, attention: str) -> Any:
    if not ZOO[name].is_present:
        pytest.skip(f"ABSENT: this transformers has no {name}")
    return ZOO[name].model(attention)


@pytest.mark.parametrize(("name", "shows", "attention", "scorer", "prefill"), MATRIX)
def test_matrix(name, shows, attention, scorer, prefill):
    """A row alone (batch 1) and in a padded batch of 3 answer the same; bytes fall."""
    zoo, model = ZOO[name], model_of(name, attention)
    config = PureKVConfig(budget=0.3, scorer=scorer, prefill=prefill, spatiotemporal=SMALL)
    with PureKV(config)(model) as run:
        together = model.generate(**zoo.prompt(shows, [0, 1, 2]), **LOGITS)
        report = run.report
        alone = [model.generate(**zoo.prompt(shows, [row]), **LOGITS) for row in range(3)]
    assert report.kv_bytes_kept < report.kv_bytes_full
    for visual, kept in zip(report.visual_tokens, report.kept_visual_tokens, strict=True):
        assert kept == int(0.3 * visual)
    if prefill != "dense" and "video" in SHOWS[shows]:
        assert "spatiotemporal" in report.prefill_per_layer
    for row, answer in enumerate(alone):
        for step, other in zip(answer.logits, together.logits, strict=True):
            torch.testing.assert_close(step[0], other[row], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("name", "shows", "attention"), [c for c in CASES if "sdpa" in c.id])
def test_layouts_are_the_same_before_and_within_generate(monkeypatch, name, shows, attention):
    """Newer transformers encode pixels first and keep the grids; spans are found all the same."""
    zoo, model, family = ZOO[name], model_of(name, attention), FAMILIES[name]
    inputs = zoo.prompt(shows, [0, 1, 2])
    before = family.layout(model.config, inputs)
    within = []

    def spy(self: Family, *args: Any) -> Layout:
        within.append(layout(self, *args))
        return within[-1]

    layout = Family.layout
    monkeypatch.setattr(Family, "layout", spy)
    with PureKV(PureKVConfig(budget=0.3))(model):
        model.generate(**inputs, **GREEDY)
    assert [one.spans for one in within] == [before.spans]
    assert torch.equal(within[0].is_visual, before.is_visual)
    assert torch.equal(before.is_visual, torch.isin(inputs["input_ids"], PLACEHOLDERS))
    for row, spans in enumerate(before.spans):
        if family.sparse:
            frames = [span.grid[0] for span in spans if span.modality == "video"]
            frames = frames[: len(frames) - zoo.video_newline * ("video" in SHOWS[shows])]
            assert sum(frames) == SHOWS[shows].count("video") * zoo.frames[row % 2]


WHOLE = [
    pytest.param(*case.values, batch, id=f"{case.id}-{batch}", marks=[pytest.mark.slow] * rare)
    for case in CASES
    for batch in (1, 3)
    for rare in [
        case.values[2] == "eager" and (batch == 1 or case.values[1] in ("image", "images"))
    ]
]


@pytest.mark.parametrize(("name", "shows", "attention", "batch"), WHOLE)
def test_a_whole_budget_changes_nothing(name, shows, attention, batch):
    model, inputs = model_of(name, attention), ZOO[name].prompt(shows, list(range(batch)))
    bare = model.generate(**inputs, **LOGITS)
    with PureKV(PureKVConfig(budget=1.0))(model) as run:
        ours = model.generate(**inputs, **LOGITS)
    assert torch.equal(ours.sequences, bare.sequences)
    for step, other in zip(ours.logits, bare.logits, strict=True):
        torch.testing.assert_close(step, other, rtol=0, atol=0)
    assert run.report.compression == 1.0


MODES = [
    {"first_token": "compressed"},
    {"evict": "active", "first_token": "compressed"},
    {"evict": "drop", "source_layers": (1,), "first_token": "compressed"},
    {"allocation": "ada"},
    {"allocation": "pyramid"},
]


def richest(name: str) -> str:
    """The fullest prompt that the family takes."""
    zoo = ZOO[name]
    fits = [s for s in SHOWS if s not in zoo.without and set(SHOWS[s]) <= set(zoo.items)]
    return fits[-1]


@pytest.mark.parametrize("settings", MODES, ids=str)
@pytest.mark.parametrize("name", ZOO)
def test_other_modes(name, settings):
    """A padded row equals the row alone, in all that a family does not refuse."""
    zoo, model, shows = ZOO[name], model_of(name, "sdpa"), richest(name)
    config = PureKVConfig(budget=0.3, **settings)
    if name == "gemma3" and "allocation" not in settings:
        with pytest.raises(PureKVError, match="sliding-window"):
            PureKV(config)(model)
        return
    with PureKV(config)(model) as run:
        together = model.generate(**zoo.prompt(shows, [0, 1, 2]), **LOGITS)
        assert run.report.kv_bytes_kept < run.report.kv_bytes_full
        alone = [model.generate(**zoo.prompt(shows, [row]), **LOGITS) for row in range(3)]
    for row, answer in enumerate(alone):
        for step, other in zip(answer.logits, together.logits, strict=True):
            torch.testing.assert_close(step[0], other[row], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("first_token", ["exact", "compressed"])
@pytest.mark.parametrize("name", [name for name in ZOO if name != "gemma3"])
def test_answers_equal_a_masked_full_cache(monkeypatch, name, first_token):
    """What was forgotten is as if it could not be seen, and nothing else is."""
    zoo, model = ZOO[name], model_of(name, "sdpa")
    inputs = zoo.prompt("video" if "mixed" in zoo.without else "mixed", [0, 1, 2])
    config = PureKVConfig(budget=0.3, first_token=first_token)
    with recorded_selections(monkeypatch) as kept, PureKV(config)(model):
        ours = model.generate(**inputs, **LOGITS)
    with twin_attention(model, inputs, kept, first_token):
        twin = model.generate(**inputs, **LOGITS)
    full = model.generate(**inputs, **LOGITS)
    for step, other in zip(ours.logits, twin.logits, strict=True):
        torch.testing.assert_close(step, other, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(ours.logits[-1], full.logits[-1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ZOO)
def test_a_further_turn(name):
    """Ids alone, on the cache that the pixels left; half an answer goes on like the whole."""
    zoo, model = ZOO[name], model_of(name, "sdpa")
    inputs = zoo.prompt(richest(name), [1])
    steps = {"do_sample": False, "return_dict_in_generate": True}
    with PureKV(PureKVConfig(budget=0.3))(model):
        whole = model.generate(**inputs, **steps, max_new_tokens=8)
        half = model.generate(**inputs, **steps, max_new_tokens=4)
        rest = model.generate(
            input_ids=half.sequences, past_key_values=half.past_key_values, **steps,
            max_new_tokens=4,
        )  # fmt: skip
    assert torch.equal(rest.sequences, whole.sequences)


def test_sound_woven_into_a_video():
    """Frames and sound take turns; the frames are one video all the same."""
    zoo, model = ZOO["qwen2_5_omni_thinker"], model_of("qwen2_5_omni_thinker", "sdpa")
    inputs = zoo.prompt("audio", [0])
    ids = inputs["input_ids"][0].tolist()
    sounds, frames = ids.count(AUDIO), ids.count(VIDEO)
    assert (sounds, frames) == (10, 12)
    woven = [VIDEO] * 8 + [AUDIO] * 6 + [VIDEO] * 4 + [AUDIO] * 4
    inputs["input_ids"] = torch.tensor([[1, 2, 3, START, MARK, *woven, CLOSE, END, 4, 5, 6]])
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["video_second_per_grid"] = torch.tensor([2.0])  # two seconds a chunk: frames of four
    layout = FAMILIES["qwen2_5_omni_thinker"].layout(model.config, inputs)
    found = [(span.modality, span.grid, span.continues) for span in layout.spans[0]]
    assert found == [
        ("video", (2, 2, 2), False),
        ("audio", (1, 1, 6), False),
        ("video", (1, 2, 2), True),
        ("audio", (1, 1, 4), False),
    ]
    patterns = row_patterns(layout, tile=1, anchor_frames=1, min_tokens=0)
    assert [len(clip.starts) for clip in patterns[0].clips] == [2]
