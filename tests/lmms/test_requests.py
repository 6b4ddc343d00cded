"""What needs no lmms-eval: the arguments, the requests and their record."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from purekv.config import PureKVConfig
from purekv.errors import PureKVError
from purekv.lmms.arguments import split_arguments
from purekv.lmms.compressing import CompressingModel
from purekv.lmms.record import Record
from purekv.report import Report
from tests.core.prompts import PROCESSOR, prompt
from tests.tiny import tiny_model

MODELS = ("pretrained", "device")


def settings(**arguments: Any) -> PureKVConfig:
    return split_arguments(arguments, MODELS)[0]


@pytest.mark.parametrize(
    ("name", "value", "meant"),
    [
        ("budget", 0.2, 0.2),
        ("budget", "0.2", 0.2),
        ("budget", "200", 200),
        ("budget", "1.0", 1.0),
        ("scorer", "snapkv", "snapkv"),
        ("window", "16", 16),
        ("window", "question", "question"),
        ("source_layers", "[2,8,14]", (2, 8, 14)),
        ("source_layers", 8, (8,)),
        ("source_layers", "auto", "auto"),
    ],
)
def test_a_setting_is_what_it_says(name: str, value: Any, meant: Any) -> None:
    found = getattr(settings(**{name: value}), name)
    assert found == meant
    assert type(found) is type(meant)


def test_the_first_token_feels_the_eviction_unless_told_otherwise() -> None:
    assert settings().first_token == "compressed"
    assert settings(first_token="exact").first_token == "exact"


def test_the_models_arguments_stay_the_models() -> None:
    config, rest = split_arguments({"pretrained": "DIR", "budget": 0.1, "device": "cpu"}, MODELS)
    assert config.budget == 0.1
    assert rest == {"pretrained": "DIR", "device": "cpu"}


def test_an_unknown_argument_is_refused_with_the_known_ones() -> None:
    with pytest.raises(
        PureKVError, match=r"'budgett'.*budget, .*scorer, .*the model's are pretrained, device"
    ):
        settings(budgett=0.2)


def test_a_budget_out_of_range_is_refused() -> None:
    with pytest.raises(PureKVError, match="budget=1 is ambiguous"):
        settings(budget="1")


def text_only() -> dict[str, torch.Tensor]:
    return dict(PROCESSOR(text=["what is it?"], return_tensors="pt"))


def ask(model: Any, inputs: dict[str, torch.Tensor]) -> list[list[int]]:
    return model.generate(**inputs, max_new_tokens=4, do_sample=False).tolist()


def test_requests_are_compressed_one_by_one() -> None:
    model, reports = tiny_model(), []
    compressing = CompressingModel(model, PureKVConfig(budget=0.5), reports.append)
    first = ask(compressing, prompt("video"))
    ask(compressing, prompt("images", batch=2))
    assert ask(compressing, prompt("video")) == first  # nothing is left of the others
    assert [report.visual_tokens for report in reports][::2] == [[18], [18]]
    assert len(reports[1].visual_tokens) == 2
    for report in reports:
        assert report.kv_bytes_kept < report.kv_bytes_full
    assert compressing.config is model.config


def test_text_alone_runs_on_the_models_own() -> None:
    model, reports = tiny_model(), []
    compressing = CompressingModel(model, PureKVConfig(budget=0.5), reports.append)
    assert ask(compressing, text_only()) == ask(model, text_only())
    assert reports == [None]


def test_a_count_above_the_visual_tokens_keeps_them_all() -> None:
    model, reports = tiny_model(), []
    compressing = CompressingModel(model, PureKVConfig(budget=200), reports.append)
    assert ask(compressing, prompt("video")) == ask(model, prompt("video"))
    assert reports == [None]


def test_the_record_sums_requests_and_lists_them(tmp_path: Path) -> None:
    model, path = tiny_model(), tmp_path / "new" / "report.jsonl"
    config = PureKVConfig(budget=0.5)
    record = Record(config, path)
    reports: list[Report | None] = []
    compressing = CompressingModel(model, config, reports.append)
    for inputs in (prompt("video"), text_only(), prompt("image")):
        ask(compressing, inputs)
        record.add(reports[-1])
    summary = record.summary()
    assert summary["purekv_requests"] == 3
    assert summary["purekv_uncompressed_requests"] == 1
    assert summary["purekv_visual_tokens_kept"] == 0.5
    assert summary["purekv_compression"] > 1
    first, *lines = (json.loads(line) for line in path.read_text().splitlines())
    assert PureKVConfig.from_dict(first["config"]) == config
    assert [line and line["visual_tokens"] for line in lines] == [[18], None, [6]]
    record.restart()
    assert record.summary() == {"purekv_requests": 0, "purekv_uncompressed_requests": 0}
