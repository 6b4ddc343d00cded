"""A plan's file, the settings that it fills in, and the models that it refuses."""

import json
from pathlib import Path

import pytest
import torch

from purekv import PureKV, PureKVConfig, PureKVError
from purekv.evals import evaluate, make_methods
from purekv.planning import Plan, model_fingerprint, shipped_plans
from purekv.planning.cost import CostModel
from purekv.planning.target import Target
from tests.core.prompts import PROCESSOR, prompt
from tests.tiny import tiny_model

SETTINGS = {
    "budget": 0.3,
    "source_layers": [0, 2],
    "layer_shares": [1.0, 0.5, 1.5],
    "spatiotemporal": {"tile": [0, 2, 4]},
}


@pytest.fixture
def plan(tmp_path):
    path = tmp_path / "plan.json"
    Plan(model_fingerprint(tiny_model()), 3, "kv=0.3", SETTINGS, {}, {"n": [[0.5] * 60] * 2}).write(
        path
    )
    return str(path)


def test_a_file_is_read_as_it_was_written(plan, tmp_path):
    again = Plan.read(plan)
    assert again.settings == SETTINGS
    again.write(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_text() == Path(plan).read_text()


def test_a_plan_sets_what_is_left_at_its_default(plan):
    config = PureKVConfig(plan=plan)
    assert (config.budget, config.source_layers) == (0.3, (0, 2))
    assert config.layer_shares == (1.0, 0.5, 1.5)
    assert config.spatiotemporal.tile == (0, 2, 4)
    assert PureKVConfig(plan=plan, budget=0.2).budget == 0.2
    assert PureKVConfig(plan=plan, source_layers=(1,)).source_layers == (1,)
    assert PureKVConfig.from_json(config.to_json()) == config
    assert PureKVConfig().budget == 0.2


@pytest.mark.parametrize(
    ("budget", "share"), [(None, 2.0), (0.3, 2.0), (0.5, 2.0), (0.04, 1.0), (10, 2.0)]
)
def test_shares_are_those_of_the_nearest_budget(tmp_path, budget, share):
    shares = {"0.05": [1.0, 1.0, 1.0], "0.3": [2.0, 1.0, 1.0]}
    path = tmp_path / "plan.json"
    Plan("0" * 12, 3, "kv=0.3", {"budget": 0.3, "layer_shares": shares}).write(path)
    assert PureKVConfig(plan=str(path), budget=budget).layer_shares[0] == share


def test_a_planned_run_keeps_what_the_plan_says(plan):
    model = tiny_model()
    with torch.no_grad(), PureKV(PureKVConfig(plan=plan))(model) as run:
        model(**prompt("video"))
    text = run.report.text_tokens[0]
    visual = [kept - text for kept in run.report.kept_per_layer]
    assert visual[1] < visual[0] < visual[2]
    assert sum(visual) == 3 * run.report.kept_visual_tokens[0]
    assert run.report.source_layers == [0, 2]


def test_another_model_is_refused_and_another_dtype_is_not(plan):
    with pytest.raises(PureKVError, match="calibrated for another model"):
        PureKV(PureKVConfig(plan=plan))(tiny_model(seed=1))
    with pytest.raises(PureKVError, match="calibrated for another model"):
        next(evaluate(tiny_model(seed=1), PROCESSOR, [], [PureKVConfig(plan=plan)]))
    PureKV(PureKVConfig(plan=plan))(tiny_model().to(torch.bfloat16))


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"purekv_plan": 9}', '{"purekv_plan": 1, "what": 2}'], ids=repr
)
def test_what_is_no_plan_is_refused(tmp_path, text):
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(PureKVError, match="is not a plan"):
        PureKVConfig(plan=str(path))


def test_a_plan_sets_nothing_but_settings(tmp_path):
    path = tmp_path / "plan.json"
    Plan("0" * 12, 3, "kv=0.1", {"plan": "other.json"}).write(path)
    with pytest.raises(PureKVError, match="unknown setting 'plan'"):
        PureKVConfig(plan=str(path))


@pytest.mark.parametrize("name", shipped_plans())
def test_what_ships_is_a_plan(name):
    assert PureKVConfig(plan=name).plan == name
    json.dumps(Plan.read(name).measured)


def test_methods_that_the_plan_is_not_for_go_without(plan):
    made = make_methods(["clie", "snapkv", "clie+ada"], [0.1], plan=plan)
    assert [config.plan for config in made] == [plan, None, None]
    assert made[0].budget == 0.1


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("kv=0.1", "kv", 0.1),
        ("prefill=3.16x", "prefill", 3.16),
        ("retention=0.99", "retention", 0.99),
    ],
)
def test_targets(text, kind, value):
    assert Target.parse(text) == Target(kind, value)
    assert str(Target.parse(text)) == text


@pytest.mark.parametrize(
    "text", ["", "kv", "kv=1.5", "kv=0.1x", "prefill=0.5", "speed=2", "kv=..1"]
)
def test_targets_that_are_none(text):
    with pytest.raises(PureKVError, match="target"):
        Target.parse(text)


def test_the_cost_model_is_near_what_was_measured():
    """What it was fitted to: 28 layers, three of them below a drop."""
    file = Path(__file__).parents[2] / "benchmarks" / "results" / "sparse_prefill.json"
    rows = json.loads(file.read_text())["rows"]
    rows = [one for one in rows if (one["what"], one["baseline"]) == ("lm_prefill", "sdpa")]
    assert len(rows) == 20
    for row in rows:
        text, tile = 80, 2 * (row["prefill"] == "spatiotemporal")
        tokens, cost = row["tokens"] + text, CostModel()
        if row["evict"] == "drop":
            found = cost.dropping(28, 2, tokens, row["budget"] * row["tokens"] + text, tile)
        else:
            found = cost.prefill([tokens] * 28, [tile] * 28)
        assert found == pytest.approx(row["ms"], rel=0.05), row
