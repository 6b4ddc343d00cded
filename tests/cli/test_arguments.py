import pytest

from purekv.cli.arguments import (
    parse_budget,
    parse_source_layers,
    parse_spatiotemporal,
    parse_window,
    repeat_options,
)
from purekv.config import SpatioTemporalConfig
from purekv.errors import PureKVError


@pytest.mark.parametrize(
    ("text", "value"), [("0.2", 0.2), ("200", 200), ("1", 1), ("1.0", 1.0), ("2e-1", 0.2)]
)
def test_budget_keeps_share_and_count_apart(text: str, value: float | int) -> None:
    budget = parse_budget(text)
    assert budget == value
    assert type(budget) is type(value)


def test_layers_and_window() -> None:
    assert parse_source_layers("auto") == "auto"
    assert parse_source_layers("2, 8,14") == (2, 8, 14)
    assert parse_window("question") == "question"
    assert parse_window("16") == 16
    for parse in (parse_budget, parse_source_layers, parse_window):
        with pytest.raises(PureKVError):
            parse("many")


def test_settings_of_the_sparse_prefill() -> None:
    assert parse_spatiotemporal("") == SpatioTemporalConfig()
    assert parse_spatiotemporal("tile=4, min_tokens=0") == SpatioTemporalConfig(4, min_tokens=0)
    assert parse_spatiotemporal("dense_layers=8").dense_layers == 8
    assert parse_spatiotemporal("dense_layers=0+4").dense_layers == (0, 4)
    assert parse_spatiotemporal("tile=0+2").tile == (0, 2)  # one for each layer
    for text in ("tiles=4", "tile", "tile=many", "tile=0", "tile=-1+2"):
        with pytest.raises(PureKVError, match="tile"):
            parse_spatiotemporal(text)


@pytest.mark.parametrize(
    ("given", "understood"),
    [
        ("--image a b --ask x", "--image a --image b --ask x"),
        ("--image a --image b c", "--image a --image b --image c"),
        ("--image=a b", "--image=a --image b"),
        ("--json --budget 0.2", "--json --budget 0.2"),
        ("--budget 0.2 stray", "--budget 0.2 stray"),
        ("--image", "--image"),
    ],
)
def test_values_gather_after_one_flag(given: str, understood: str) -> None:
    assert repeat_options(given.split()) == understood.split()
