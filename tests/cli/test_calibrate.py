"""`purekv calibrate` on a tiny model: a plan that the other verbs take, and a killed run's rest."""

import json

import pytest

from purekv.planning import Plan, calibrate


@pytest.fixture(scope="module")
def data(video, tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    lines = [
        {"id": str(k), "video": str(video), "turns": [
            {"question": f"what is {k}?", "answer": "a car"}, {"question": "and?", "answer": "no"},
        ][: 1 + k]}
        for k in range(2)
    ]  # fmt: skip
    (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def words(checkpoint, data, tmp_path):
    return ["calibrate", "--model", checkpoint, "--data", data, "--out", tmp_path / "plan.json"]


def test_a_budget_s_plan_is_one_that_run_takes(cli_json, words, checkpoint, video, tmp_path):
    made = cli_json(*words, "--target", "kv=0.3")
    plan = Plan.read(str(tmp_path / "plan.json"))
    assert made["settings"] == plan.settings
    assert plan.settings["budget"] == 0.3
    assert plan.settings["source_layers"][0] == 0
    shares = plan.settings["layer_shares"]
    assert {len(of_layers) for of_layers in shares.values()} == {3}
    assert set(shares) >= {"0.02", "0.3"}
    assert plan.measured["samples"] == 2
    assert not (tmp_path / "plan.json.measured").exists()
    ran = cli_json(
        "run", "--model", checkpoint, "--video", video, "--ask", "what?", "--max-new-tokens", 2,
        "--plan", tmp_path / "plan.json", "--certificate",
    )  # fmt: skip
    assert ran["budget"] == 0.3
    assert ran["config"]["layer_shares"] == shares["0.3"]
    assert len(ran["certificate"]) == 3


def test_a_speed_up_s_plan(cli_json, words, tmp_path):
    made = cli_json(*words, "--target", "prefill=1.4x", "--n", 1)
    assert made["expected"]["speedup"] >= 1.4
    assert set(made["settings"]) & {"prefill", "evict"}
    assert made["expected"]["ms"] < made["expected"]["dense ms"]


def test_a_speed_up_out_of_reach(cli, words):
    code, _, err = cli(*words, "--target", "prefill=50x", "--n", 1)
    assert code == 2
    assert "out of reach" in err


def test_a_retention_takes_the_smallest_budget(cli_json, words, monkeypatch):
    monkeypatch.setattr(calibrate, "BUDGETS", (0.2, 0.5))
    made = cli_json(*words, "--target", "retention=0.01")
    assert made["settings"]["budget"] == 0.2


def test_a_killed_calibration_goes_on(cli, words, tmp_path, monkeypatch):
    target = ("--target", "kv=0.3")
    whole = calibrate._chat
    asked = []

    def killed(c, sample):
        if asked:
            raise MemoryError
        asked.append(sample.id)
        return whole(c, sample)

    monkeypatch.setattr(calibrate, "_chat", killed)
    assert cli(*words, *target)[0] == 2
    assert len((tmp_path / "plan.json.measured").read_text().splitlines()) == 2

    def noted(c, sample):
        asked.append(sample.id)
        return whole(c, sample)

    monkeypatch.setattr(calibrate, "_chat", noted)
    assert cli(*words, *target)[0] == 0
    assert asked == ["0", "1"]
    first = (tmp_path / "plan.json").read_text()
    monkeypatch.setattr(calibrate, "_chat", whole)
    assert cli(*words, *target)[0] == 0
    assert (tmp_path / "plan.json").read_text() == first


def test_a_target_that_is_none(cli, words):
    code, _, err = cli(*words, "--target", "kv=3")
    assert code == 2
    assert "retention=0.99" in err
