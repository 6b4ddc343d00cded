"""Every family: family x what it shows x attention x batch x scorer x prefill, on tiny models."""

from functools import cache
from typing import Any

import pytest
import torch

from purekv import PureKV, PureKVConfig, SpatioTemporalConfig
from purekv.families import FAMILIES, Family
from purekv.layout import Layout
from tests.families.zoo import AUDIO, IMAGE, SHOWS, VIDEO, ZOO

STEPS = 4
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


@cache
def model_of(name: str, attention: str) -> Any:
    if not ZOO[name].is_present:
        pytest.skip(f"ABSENT: this transformers has no {name}")
    return ZOO[name].model(attention)


@pytest.mark.parametrize("prefill", ["dense", "spatiotemporal"])
@pytest.mark.parametrize("scorer", ["clie", "snapkv"])
@pytest.mark.parametrize(("name", "shows", "attention"), CASES)
def test_matrix(name, shows, attention, scorer, prefill):
    """A row alone (batch 1) and in a padded batch of 3 answer the same; bytes fall."""
    zoo, model = ZOO[name], model_of(name, attention)
    if prefill != "dense" and not FAMILIES[name].sparse:
        pytest.skip("no frames to be sparse about")
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


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("name", "shows", "attention"), CASES)
def test_a_whole_budget_changes_nothing(name, shows, attention, batch):
    model, inputs = model_of(name, attention), ZOO[name].prompt(shows, list(range(batch)))
    bare = model.generate(**inputs, **LOGITS)
    with PureKV(PureKVConfig(budget=1.0))(model) as run:
        ours = model.generate(**inputs, **LOGITS)
    assert torch.equal(ours.sequences, bare.sequences)
    for step, other in zip(ours.logits, bare.logits, strict=True):
        torch.testing.assert_close(step, other, rtol=0, atol=0)
    assert run.report.compression == 1.0
