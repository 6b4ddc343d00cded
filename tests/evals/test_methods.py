"""Lists of methods to configs: each once, and only what there is."""

from dataclasses import replace

import pytest

from purekv import PureKVError
from purekv.evals import make_configs, make_methods, method_name
from purekv.planning.plan import Plan
from tests.tiny import tiny_processor


def shown(methods):
    return [(method_name(method), method.evict, method.budget) for method in methods]


@pytest.mark.parametrize(
    "names", [["snapkv+pyramid", "pyramidkv"], ["pyramidkv", "evs", "snapkv+pyramid", "evs"]]
)
def test_equal_configs_are_one_row(names):
    found = make_methods(names, [0.5, 0.2, 0.5])
    expected = [
        (name, 0.5)
        for name in dict.fromkeys(n.replace("snapkv+pyramid", "pyramidkv") for n in names)
    ]
    assert [(name, budget) for name, _, budget in shown(found) if budget == 0.5] == expected
    assert len(found) == len(set(found)) == 2 * len(expected)


def test_frames_are_listed_once():
    assert shown(make_methods(["frames", "clie", "frames"], [0.5, 1.0, 0.5])) == [
        ("frames", None, 0.5), ("clie", "post", 0.5)
    ]  # fmt: skip
    (method,) = make_methods(["frames"], [0.5])
    assert method.multiple_of == 28
    assert method.for_processor(tiny_processor()).multiple_of == 16


def test_the_whole_budget_is_left_out_where_nothing_is_sparse():
    assert make_methods(["clie"], [1.0]) == []
    assert shown(make_methods(["clie"], [1.0], prefill="spatiotemporal")) == [("clie", "post", 1.0)]
    sparse = make_configs(["clie"], [1.0], prefills=["dense", "spatiotemporal"])
    assert [config.prefill for config in sparse] == ["spatiotemporal"]


def test_the_whole_budget_stays_where_a_plan_is_sparse(tmp_path):
    plan = replace(Plan.read("reference"), settings={"prefill": "spatiotemporal"})
    plan.write(tmp_path / "plan.json")
    (config,) = make_configs(["clie"], [1.0], plan=str(tmp_path / "plan.json"))
    assert (config.prefill, config.budget) == ("spatiotemporal", 1.0)


def test_frames_name_the_budget_that_is_no_share():
    with pytest.raises(PureKVError, match="budget=3;"):
        make_methods(["frames", "clie"], [0.5, 3])


def test_no_methods_are_the_full_cache_alone():
    assert make_methods([], [0.5]) == []


def test_ways_to_evict_that_a_method_lacks_are_left_out():
    found = make_configs(["clie", "random", "clie+ada"], [0.5, 0.2], evicts=["post", "drop"])
    assert {(name, evict) for name, evict, _ in shown(found)} == {
        ("clie", "post"), ("clie", "drop"), ("random", "post"), ("clie+ada", "post")
    }  # fmt: skip
    assert shown(make_configs(["frame_difference"], [0.5], evicts=["post", "drop"])) == [
        ("evs", "drop", 0.5)
    ]


@pytest.mark.parametrize(
    ("name", "evicts", "message"),
    [
        ("random", ["drop"], "cannot drop"),
        ("clie+ada", ["drop"], "needs evict='post'"),
        ("frame_difference", ["post"], "use evict='drop'"),
        ("clie", ["post", "later"], "evict='later' is not available"),
    ],
)
def test_a_method_without_any_of_them_is_refused(name, evicts, message):
    with pytest.raises(PureKVError, match=message):
        make_configs([name], [0.5], evicts=evicts)


def test_other_settings_are_refused_whatever_evicts():
    with pytest.raises(PureKVError, match=r"budget=0\.0"):
        make_configs(["clie", "snapkv"], [0.5, 0.0], evicts=["post", "drop"])
