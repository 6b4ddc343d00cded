"""Free text against what people answered: CIDEr and ROUGE-L, of the library that the AVSD
challenges score with (pycocoevalcap)."""

import re
from collections.abc import Sequence
from importlib import import_module

from purekv.errors import PureKVError

METRICS = {
    "cider": ("pycocoevalcap.cider.cider", "Cider"),
    "rouge_l": ("pycocoevalcap.rouge.rouge", "Rouge"),
}
"""Where the library has them. CIDEr is CIDEr-D, from 0 to 10; ROUGE-L, from 0 to 1, weighs recall
by 1.2."""

_WORD = re.compile(r"n't|'(?:s|re|ve|ll|d|m)\b|\w+(?:-\w+)*")


def require_text_metrics() -> None:
    """Raises PureKVError if the library is not installed."""
    try:
        for module, _ in METRICS.values():
            import_module(module)
    except ImportError as error:
        raise PureKVError(
            f"answers with references need CIDEr and ROUGE-L ({error}); pip install 'purekv[avsd]'"
        ) from error


def text_scores(
    answers: Sequence[str], references: Sequence[Sequence[str]]
) -> dict[str, list[float]]:
    """For each metric a score of each answer, against one reference or more.

    CIDEr weighs words by how rare they are among all references given: scores of one answer compare
    only within one data set.

    Raises:
        PureKVError: the library is not installed.
    """
    require_text_metrics()
    said = {number: [words(answer)] for number, answer in enumerate(answers)}
    gold = {number: [words(one) for one in several] for number, several in enumerate(references)}
    scores = {}
    for name, (module, metric) in METRICS.items():
        _, each = getattr(import_module(module), metric)().compute_score(gold, said)
        scores[name] = [float(score) for score in each]
    return scores


def words(text: str) -> str:
    """Lower-case words with single spaces between, without punctuation, contractions apart ("do
    n't", "it 's"): what the challenges' tokenizer, which needs Java, makes of plain English."""
    straight = text.lower().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")
    return " ".join(_WORD.findall(re.sub(r"(\w)n't\b", r"\1 n't", straight)))
