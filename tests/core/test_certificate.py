"""The certificate: its bound holds on any tensors, and a run reports what is true of it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from purekv import PureKV, PureKVConfig, PureKVError
from purekv.certificate import measure
from purekv.scoring import make_scorer
from tests.core.prompts import prompt
from tests.core.test_scorers import SHAPES, full_attention, layer_inputs
from tests.tiny import tiny_model

ROUNDING = 1e-5


@given(
    st.sampled_from(list(SHAPES)),
    st.sampled_from([1, 3]),
    st.integers(0, 10_000),
    st.floats(0.0, 1.0),
    st.floats(0.1, 30.0),
)
@settings(max_examples=60, deadline=None)
def test_no_error_exceeds_its_bound(shape, groups, seed, share, sharpness):
    layer = layer_inputs(shape, groups, seed)
    layer = type(layer)(**{**vars(layer), "scaling": 0.3 * sharpness})
    generator = torch.Generator().manual_seed(seed)
    dropped = torch.rand(layer.value.shape[:3], generator=generator) < share
    dropped &= layer.layout.is_visual[:, None]
    scores = make_scorer("clie", (1,), 3)
    found = measure(layer, dropped, scores.score(layer, scores.observe(layer)))
    slack = ROUNDING * found.output
    assert (found.error <= found.bound + slack).all()
    terms = found.dropped_scores + found.transfer + found.kept
    assert (found.bound <= terms + slack).all()
    assert ((found.dropped_mass >= 0) & (found.dropped_mass <= found.largest_dropped_mass)).all()
    assert (found.largest_dropped_mass <= 1).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("block", [2**25, 7])
def test_measures_equal_their_definitions(shape, block, monkeypatch):
    monkeypatch.setattr("purekv.certificate.BLOCK_ELEMENTS", block)
    layer = layer_inputs(shape, 3)
    dropped = layer.layout.is_visual[:, None].expand(-1, 2, -1).clone()
    dropped[:, :, ::3] = False
    found = measure(layer, dropped, torch.zeros(dropped.shape))
    for row, own in enumerate(layer.layout.is_token):
        is_query = layer.layout.is_tail[row][own]
        weight = full_attention(layer, row)[:, :, is_query]  # [Hkv, groups, W, n]
        value = layer.value[row, :, own].double()[:, None]
        gone = dropped[row][:, own][:, None, None]
        kept = weight.masked_fill(gone, 0.0)
        kept_output = (kept / kept.sum(-1, keepdim=True)) @ value
        output = weight @ value
        lost = weight.masked_fill(~gone, 0.0)
        distance = torch.cdist(kept_output, value.expand(-1, 3, -1, -1))
        for name, expected in {
            "output": output.norm(dim=-1),
            "dropped_mass": lost.sum(-1),
            "error": (output - kept_output).norm(dim=-1),
            "bound": (lost * distance).sum(-1),
            "kept": lost.sum(-1) * kept_output.norm(dim=-1),
            "transfer": (lost * value.norm(dim=-1)[:, :, None]).sum(-1),  # as no score is above 0
        }.items():
            torch.testing.assert_close(
                getattr(found, name)[row].double(), expected.mean(), atol=1e-5, rtol=1e-4
            )
        torch.testing.assert_close(
            found.largest_dropped_mass[row].double(), lost.sum(-1).max(), atol=1e-5, rtol=1e-4
        )


def test_dropping_nothing_costs_nothing():
    layer = layer_inputs("padded", 3)
    found = measure(layer, torch.zeros(3, 2, 27, dtype=torch.bool), torch.ones(3, 2, 27))
    for value in (found.dropped_mass, found.error, found.bound, found.dropped_scores):
        assert (value < 1e-5).all()


def run_once(batch=2, **fields):
    model = tiny_model()
    with torch.no_grad(), PureKV(PureKVConfig(**fields))(model) as run:
        output = model(**prompt("video", batch))
    return run.report, output


@pytest.mark.parametrize(
    ("evict", "allocation"),
    [("post", "uniform"), ("active", "uniform"), ("drop", "uniform"), ("post", "ada")],
)
def test_a_run_reports_one_for_each_layer(evict, allocation):
    fields = {"budget": 0.2, "evict": evict, "allocation": allocation, "source_layers": (1,)}
    report, _ = run_once(**fields, certificate=True)
    assert len(report.certificate) == (2 if evict == "drop" else 3)
    for one in report.certificate:
        assert 0 < one.error <= one.bound + ROUNDING
        assert one.bound <= one.clie_bound + ROUNDING
        assert not one.own_scores
    assert report.to_dict()["certificate"][0]["bound"] == report.certificate[0].bound


def test_nobody_pays_who_did_not_ask(monkeypatch):
    monkeypatch.setattr("purekv.prefill.measure", None)
    assert run_once(budget=0.2)[0].certificate is None


def test_measuring_changes_nothing():
    _, plain = run_once(budget=0.2, first_token="compressed")
    _, measured = run_once(budget=0.2, first_token="compressed", certificate=True)
    assert torch.equal(plain.logits, measured.logits)


def test_other_scores_have_no_terms():
    report, _ = run_once(budget=0.2, scorer="key_diff", certificate=True)
    assert report.certificate[0].clie_bound is None
    assert report.certificate[0].error <= report.certificate[0].bound


@pytest.mark.parametrize("allocation", ["uniform", "ada"])
def test_layers_above_the_tolerance_choose_by_themselves(allocation):
    settings = {"budget": 0.2, "source_layers": (0,), "allocation": allocation}
    before, _ = run_once(batch=1, **settings, certificate=True)
    highest = max(one.bound for one in before.certificate)
    loose, _ = run_once(batch=1, **settings, tolerance=1.01 * highest)
    assert [one.bound for one in loose.certificate] == [one.bound for one in before.certificate]
    tight, _ = run_once(batch=1, **settings, tolerance=1e-6)
    assert any(one.own_scores for one in tight.certificate)
    for old, new in zip(before.certificate, tight.certificate, strict=True):
        assert new.bound <= old.bound + ROUNDING
        assert not new.own_scores or new.bound < old.bound


@pytest.mark.parametrize("tolerance", [0, -0.1, "much"])
def test_a_tolerance_is_a_share(tolerance):
    with pytest.raises(PureKVError, match="tolerance"):
        PureKVConfig(tolerance=tolerance)
