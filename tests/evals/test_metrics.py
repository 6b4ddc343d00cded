import pytest

from purekv.evals import chosen_letter, exact_match, retention_interval, wilson_interval


def test_exact_match_ignores_case_space_and_punctuation_at_the_ends():
    assert exact_match(" Top  left.", "top left")
    assert exact_match("K7R4", "k7r4")
    assert not exact_match("left", "top left")


@pytest.mark.parametrize(
    ("ours", "gold"),
    [
        ("5", "-5"), ("5", "5%"), ("5", "$5"), ("5", ".5"), ("", "+"), ("?!", "-"), ("", "."),
        ("?!", "!?"), ("。", "x"), ("C", "C#"), ("left", ""),
    ],
)  # fmt: skip
def test_signs_and_units_are_part_of_an_answer(ours, gold):
    assert not exact_match(ours, gold)
    assert not exact_match(gold, ours)


@pytest.mark.parametrize(
    ("ours", "gold"),
    [
        ("red。", "red"), ("「red」", "Red"), ("Straße", "STRASSE"), ("e\u0301", "é"),
        ("(top left)", "top left"), ("“red”!", "red"), ("red…", "red"), ("?!", "?!"),
        (".5.", ".5"), ("-5.", "-5"), ("\uff08red\uff09\uff01", "red"),
    ],
)  # fmt: skip
def test_scripts_and_quotes_do_not_matter(ours, gold):
    assert exact_match(ours, gold)


@pytest.mark.parametrize(
    "answer",
    [
        "B", "b.", "(B)", "(b).", "B. red", "B: red", "B) red", "B, because it is", "B\nIt is red",
        "B - red", "**B**", "\"B\"", "'b'", "The answer is B", "answer: B", "Answer: (B) red",
        "The correct answer is **B**.", "Option B", "B。", "\uff08B\uff09", "B!",
    ],
)  # fmt: skip
def test_a_letter_that_stands_alone_is_the_choice(answer):
    assert chosen_letter(answer) == "B"


@pytest.mark.parametrize(
    "answer",
    [
        "A dog runs", "I think B", "Blue", "", "The answer is a dog", "b's", "B-side", "a.m.",
        "It is not B", "B5", "()", "A and B", "Answers.",
    ],
)  # fmt: skip
def test_words_name_no_choice(answer):
    assert chosen_letter(answer) is None


@pytest.mark.parametrize(
    ("correct", "n", "low", "high"),
    [(0, 10, 0.0, 0.2775), (9, 10, 0.5958, 0.9821), (50, 100, 0.4038, 0.5962)],
)
def test_wilson_against_published_values(correct, n, low, high):
    assert wilson_interval(correct, n) == pytest.approx((low, high), abs=1e-4)


def test_retention_is_paired_and_clustered():
    full = [True] * 90 + [False] * 10
    ours = [True] * 81 + [False] * 19
    alone = retention_interval(ours, full, [str(i) for i in range(100)])
    together = retention_interval(ours, full, [str(i // 10) for i in range(100)])
    assert alone[0] == together[0] == pytest.approx(0.9)
    assert alone[1] < 0.9 < alone[2]
    assert together[2] - together[1] > alone[2] - alone[1]


@pytest.mark.parametrize("n", [5, 30, 90])
def test_nothing_lost_is_not_certain(n):
    full = [True] * n + [False] * 10  # where nothing was right, nothing could be lost
    clusters = [str(i) for i in range(n + 10)]
    low = wilson_interval(n, n)[0]
    assert retention_interval(full, full, clusters) == pytest.approx((1.0, low, 1.0))
    twice = retention_interval(full * 2, full * 2, clusters * 2)
    assert twice == pytest.approx((1.0, low, 1.0))


def test_everything_lost_is_not_certain():
    full, none = [True] * 20, [False] * 20
    found = retention_interval(none, full, [str(i) for i in range(20)])
    assert found == pytest.approx((0.0, 0.0, wilson_interval(0, 20)[1]))


@pytest.mark.parametrize("count", [1, 2, 4])
def test_few_clusters_have_no_interval(count):
    full = [True] * 12 + [False] * 12
    ours = [True, False] * 12
    clusters = [str(i % count) for i in range(12)] + [str(100 + i) for i in range(12)]
    assert retention_interval(ours, full, clusters) == (1.0, None, None)
