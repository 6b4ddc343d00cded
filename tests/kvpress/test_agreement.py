"""Ours against what kvpress kept on the same tensors; `make test-kvpress` writes those first."""

from pathlib import Path

import pytest

from benchmarks.kvpress_agreement import COMPARISONS, Comparison, Dump, compare

pytestmark = pytest.mark.kvpress

FOLDER = Path(__file__).parents[2] / "build" / "kvpress"


@pytest.fixture(scope="module")
def dump() -> Dump:
    return Dump(FOLDER)


@pytest.mark.parametrize("budget", [0.5, 0.2])
@pytest.mark.parametrize("comparison", COMPARISONS, ids=lambda one: f"{one.method}, {one.setting}")
def test_ours_keeps_the_same_but_for_what_differs(
    comparison: Comparison, budget: float, dump: Dump
) -> None:
    row = compare(comparison, dump, budget)
    if not comparison.differs:
        assert row["agreement"] > 0.995  # equal scores may be rounded apart
    elif comparison.theirs == "knorm":
        assert row["agreement"] == pytest.approx(row["chance"], abs=0.1)
    else:
        assert row["agreement"] > row["chance"] + 0.25
