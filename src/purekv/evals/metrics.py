"""Exact match, and intervals that a sceptic would accept."""

import math
import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

_Z = 1.959963984540054  # 95 %, two-sided
_FEWEST_CLUSTERS = 5  # resamples of fewer hardly differ

_SENTENCE = ".,;:!?\"'…。、¡¿"  # and brackets and quotes, in any script

_LETTER = (
    r"[\s*_\"'([]*([a-z])"
    r"(?=[\s*_]*(?:$|\n|[,;:!?\")\]。、]|'(?!\w)|\.(?!\w\b)|[-\u2013\u2014]\s))"
)
_NAMED = re.compile(
    r"[\s*_]*(?:(?:the|my)\s+)?(?:(?:correct|right|best|final)\s+)?"
    r"(?:answer|option|choice|letter)(?:\s+is)?(?:\s*:|(?!\w))" + _LETTER
)
_ALONE = re.compile(_LETTER)
_QUOTES = str.maketrans("\u2018\u2019\u201c\u201d", "''\"\"")


def exact_match(prediction: str, gold: str) -> bool:
    """Equal up to case, white space, and punctuation, quotes and brackets at the ends.

    "5", "-5" and "5%" are three answers.
    """
    return _normalise(prediction) == _normalise(gold)


def chosen_letter(prediction: str) -> str | None:
    """The choice that an answer names: "B" for "B", "b.", "(B)", "B. red" or "The answer is B".

    None where no letter stands alone: "Blue", "A dog runs", "I think B".
    """
    text = unicodedata.normalize("NFKC", prediction).translate(_QUOTES).strip().lower()
    found = _ALONE.match(text) or _NAMED.match(text)
    return found[1].upper() if found else None


def _normalise(text: str) -> str:
    """Composed characters, folded case, single spaces, bare ends; never nothing of something."""
    folded = unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold())
    words = " ".join(folded.split())
    bare = words.strip("".join(filter(_is_outer, set(words))))
    start = words.find(bare)
    if bare[:1].isdigit() and words[:start].endswith((".", ",")):
        bare = words[start - 1] + bare  # ".5" is not "5"
    return bare or words


def _is_outer(char: str) -> bool:
    """Whether it ends or encloses a sentence; signs and units of numbers do not."""
    encloses = unicodedata.category(char) in ("Ps", "Pe", "Pi", "Pf")
    ends = {char, unicodedata.normalize("NFKC", char)} & set(_SENTENCE)
    return encloses or bool(ends) or char == " "


def wilson_interval(correct: int, n: float) -> tuple[float, float]:
    """95% Wilson score interval of a proportion."""
    return _wilson(correct / n, n) if n else (0.0, 1.0)


def accuracy_interval(rights: Sequence[bool], clusters: Sequence[str]) -> tuple[float, float]:
    """95% interval of the share of right answers, where those of one cluster may go together.

    Wilson's, with as many answers as would tell as much if they were independent: their number
    over the design effect (variance between clusters over that of independent answers, at least
    1). Answers that are all right or all wrong count once a cluster.
    """
    n = len(rights)
    if n == 0:
        return 0.0, 1.0
    _, member = np.unique(np.asarray(clusters), return_inverse=True)
    sizes = np.bincount(member)
    sums = np.bincount(member, np.asarray(rights, dtype=float))
    share, count = sums.sum() / n, len(sizes)
    if count == 1 or share in (0.0, 1.0):
        return _wilson(share, count)
    variance = np.square(sums - share * sizes).sum() * count / (count - 1) / n**2
    effect = max(1.0, variance * n / (share * (1 - share)))
    return _wilson(share, n / effect)


def _wilson(share: float, n: float) -> tuple[float, float]:
    centre = share + _Z**2 / (2 * n)
    half = _Z * np.sqrt(share * (1 - share) / n + _Z**2 / (4 * n**2))
    scale = 1 + _Z**2 / n
    return float((centre - half) / scale), float((centre + half) / scale)


def mean_interval(
    values: Sequence[float], clusters: Sequence[str], resamples: int = 2000, seed: int = 0
) -> tuple[float, float] | None:
    """95% interval of a mean score: percentile bootstrap over clusters, None below 5 of them."""
    names, member = np.unique(np.asarray(clusters), return_inverse=True)
    if len(names) < _FEWEST_CLUSTERS:
        return None
    picked = _bootstrap(len(names), resamples, seed)
    sums, sizes = np.bincount(member, np.asarray(values)), np.bincount(member)
    low, high = np.percentile(picked @ sums / (picked @ sizes), [2.5, 97.5])
    return float(low), float(high)


def retention_interval(
    ours: Sequence[float],
    full: Sequence[float],
    clusters: Sequence[str],
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float | None, float | None, float | None]:
    """Accuracy over the full cache's accuracy on the same questions, with a 95% interval; of scores
    of 0 or more likewise.

    Paired percentile bootstrap over clusters (videos), since questions about one video are not
    independent. Where all resamples agree, as they do when no answer changed, they tell nothing of
    the next video: then it is Wilson's interval of the share of answers kept, each cluster in which
    the full cache is right counting once; 30 of them with nothing lost give [0.887, 1].

    Returns:
        (retention, low, high); None thrice where the full cache gets nothing right, no interval
        where it is right in fewer than 5 clusters. Resamples without a right answer are left out.
    """
    names, member = np.unique(np.asarray(clusters), return_inverse=True)
    ours_sum = np.bincount(member, np.asarray(ours, dtype=float), len(names))
    full_sum = np.bincount(member, np.asarray(full, dtype=float), len(names))
    if not full_sum.any():
        return None, None, None
    retention = float(ours_sum.sum() / full_sum.sum())
    telling = int((full_sum > 0).sum())
    if telling < _FEWEST_CLUSTERS:
        return retention, None, None
    picked = _bootstrap(len(names), resamples, seed)
    ours_right, full_right = picked @ ours_sum, picked @ full_sum
    counted = full_right > 0
    low, high = np.percentile(ours_right[counted] / full_right[counted], [2.5, 97.5])
    if not np.isclose(low, high):
        return retention, float(low), float(high)
    low, high = np.clip(_wilson(min(retention, 1.0), telling), 0.0, 1.0)
    high = max(high, retention)
    return retention, float(low), float(high)


def mcnemar(ours: Sequence[bool], full: Sequence[bool]) -> float:
    """Two-sided p of McNemar's exact test: are answers lost as often as they are gained?

    Binomial over the answers on which the two differ. It takes them as independent, which answers
    about one video are not, so read it beside the clustered interval of the retention.
    """
    lost = sum(b and not a for a, b in zip(ours, full, strict=True))
    gained = sum(a and not b for a, b in zip(ours, full, strict=True))
    n = lost + gained
    tail = sum(math.comb(n, k) for k in range(min(lost, gained) + 1)) / 2**n
    return min(1.0, 2 * tail)


@lru_cache(maxsize=8)
def _bootstrap(clusters: int, resamples: int, seed: int) -> np.ndarray:
    """How often each resample picks each cluster, [resamples, clusters]; the same for all rows of
    a table."""
    picks = np.random.default_rng(seed).integers(clusters, size=(resamples, clusters))
    return np.stack([np.bincount(pick, minlength=clusters) for pick in picks]).astype(float)
