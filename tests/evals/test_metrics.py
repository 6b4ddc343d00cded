import pytest

from purekv.evals import exact_match, retention_interval, wilson_interval


def test_exact_match_ignores_case_space_and_punctuation_at_the_ends():
    assert exact_match(" Top  left.", "top left")
    assert exact_match("K7R4", "k7r4")
    assert not exact_match("left", "top left")


@pytest.mark.parametrize(
    ("correct", "n", "low", "high"),
    [(0, 10, 0.0, 0.2775), (9, 10, 0.5958, 0.9821), (50, 100, 0.4038, 0.5962)],
)
def test_wilson_against_published_values(correct, n, low, high):
    assert wilson_interval(correct, n) == pytest.approx((low, high), abs=1e-4)


def test_retention_is_paired_and_clustered():
    full = [True] * 90 + [False] * 10
    assert retention_interval(full, full, [str(i) for i in range(100)]) == (1.0, 1.0, 1.0)
    ours = [True] * 81 + [False] * 19
    alone = retention_interval(ours, full, [str(i) for i in range(100)])
    together = retention_interval(ours, full, [str(i // 10) for i in range(100)])
    assert alone[0] == together[0] == pytest.approx(0.9)
    assert alone[1] < 0.9 < alone[2]
    assert together[2] - together[1] > alone[2] - alone[1]
