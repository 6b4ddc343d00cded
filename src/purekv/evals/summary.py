"""Records of samples to rows of a table, with intervals that a sceptic would accept."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from purekv.evals.methods import Method, method_name
from purekv.evals.metrics import accuracy_interval, mcnemar, mean_interval, retention_interval
from purekv.evals.samples import Sample
from purekv.evals.suite import Record
from purekv.evals.text_metrics import text_scores

FULL = "full"


@dataclass(frozen=True)
class _Answer:
    """One turn of one sample."""

    category: str
    turn: int
    media: str
    cluster: str
    right: bool
    full_right: bool
    kl: float
    agreement: float


def summarise(
    samples: Sequence[Sample],
    records: Mapping[str, Record],
    configs: Sequence[Method],
    seed: int = 0,
) -> list[dict[str, Any]]:
    """A row for the full cache, then one for each config; plain JSON types.

    Over the samples that have a record and were not skipped. `accuracy` is over the answers to all
    turns, `first_turn` and `second_turn` (all later turns) hold them apart; `ci95` is Wilson's for
    answers clustered by media, `retention` the accuracy over the full cache's with a bootstrap over
    media (no interval, None, where those are too few), `mcnemar_p` an exact paired test against the
    full cache, `kl` and `agreement` compare the next-token distributions along the gold answers
    with the full cache's. Where turns have references, `cider` and `rouge_l` are over those.

    Args:
        seed: of the bootstrap.
    """
    asked = [(s, records[s.id]) for s in samples if s.id in records and not records[s.id].skipped]
    clusters = media_clusters([sample for sample, _ in asked])
    rows = [
        _row(asked, clusters, number, config, seed)
        for number, config in enumerate([None, *configs])
    ]
    for row, scores in zip(rows, _free_text(asked, clusters, len(rows), seed), strict=False):
        row |= scores
    return rows


def media_clusters(samples: Sequence[Sample]) -> list[str]:
    """For each sample, the name of its cluster: those that share a video or an image, be it through
    others, are not independent."""
    parents: dict[Path, Path] = {}

    def root(path: Path) -> Path:
        while (parent := parents.setdefault(path, path)) != path:
            parents[path] = path = parents[parent]
        return path

    shown = [sample.videos + sample.images for sample in samples]
    for first, *others in shown:
        for other in others:
            parents[root(other)] = root(first)
    names: dict[Path, str] = {}
    for paths in shown:
        names.setdefault(root(paths[0]), "|".join(map(str, paths)))
    return [names[root(paths[0])] for paths in shown]


def _row(
    asked: Sequence[tuple[Sample, Record]],
    clusters: Sequence[str],
    number: int,
    config: Method | None,
    seed: int,
) -> dict[str, Any]:
    answers = []
    for (sample, record), cluster in zip(asked, clusters, strict=True):
        ours, full = record.outcomes[number], record.outcomes[0]
        columns = zip(sample.turns, ours.right, full.right, ours.kl, ours.agreement, strict=True)
        for place, (turn, right, full_right, kl, agreement) in enumerate(columns, 1):
            answers.append(
                _Answer(
                    turn.category,
                    place,
                    sample.media,
                    cluster,
                    right,
                    full_right,
                    kl,
                    agreement,
                )
            )
    count = max(1, len(asked))
    later = [answer for answer in answers if answer.turn > 1]
    row: dict[str, Any] = {
        "what": "quality",
        "method": method_name(config) if config else FULL,
        "prefill": config.prefill if config else "dense",
        "evict": config.evict if config else None,
        "first_token": config.first_token if config else "exact",
        "budget": config.budget if config else 1.0,
        "source_layers": config.source_layers if config else None,
        "plan": config.plan if config else None,
        "prune": getattr(config, "prune", None),
        "tokens": round(sum(record.visual_tokens for _, record in asked) / count),
        "samples": len(asked),
        **_part(answers, seed),
        "mcnemar_p": mcnemar([a.right for a in answers], [a.full_right for a in answers]),
        "kl": _mean([answer.kl for answer in answers]),
        "agreement": _mean([answer.agreement for answer in answers]),
        "kv_bytes": round(sum(record.outcomes[number].kv_bytes for _, record in asked) / count),
        "first_turn": _part([answer for answer in answers if answer.turn == 1], seed),
        "second_turn": _part(later, seed) if later else None,
    }
    keys: dict[str, Callable[[_Answer], str]] = {
        "category": lambda answer: answer.category,
        "turn": lambda answer: str(answer.turn),
        "media": lambda answer: answer.media,
    }
    for name, key in keys.items():
        parts: dict[str, list[_Answer]] = defaultdict(list)
        for answer in answers:
            parts[key(answer)].append(answer)
        row[f"by_{name}"] = {value: _part(part, seed) for value, part in sorted(parts.items())}
    return row


def _free_text(
    asked: Sequence[tuple[Sample, Record]], clusters: Sequence[str], count: int, seed: int
) -> list[dict[str, Any]]:
    """Of each method, metrics of the answers that have references; nothing if none has."""
    places = [
        (number, turn)
        for number, (sample, _) in enumerate(asked)
        for turn, one in enumerate(sample.turns)
        if one.references
    ]
    if not places:
        return []
    references = [asked[number][0].turns[turn].references for number, turn in places]
    owners = [clusters[number] for number, _ in places]
    scores = [
        text_scores(
            [asked[number][1].outcomes[method].answers[turn] for number, turn in places], references
        )
        for method in range(count)
    ]
    return [
        {name: _scored(values, scores[0][name], owners, seed) for name, values in ours.items()}
        for ours in scores
    ]


def _scored(
    ours: Sequence[float], full: Sequence[float], clusters: Sequence[str], seed: int
) -> dict[str, Any]:
    retention, low, high = retention_interval(ours, full, clusters, seed=seed)
    bounds = mean_interval(ours, clusters, seed=seed)
    return {
        "n": len(ours),
        "score": _mean(ours),
        "ci95": None if bounds is None else list(bounds),
        "retention": retention,
        "retention_ci95": None if low is None else [low, high],
    }


def _part(answers: Sequence[_Answer], seed: int) -> dict[str, Any]:
    ours, full = [a.right for a in answers], [a.full_right for a in answers]
    clusters = [answer.cluster for answer in answers]
    retention, low, high = retention_interval(ours, full, clusters, seed=seed)
    return {
        "n": len(answers),
        "accuracy": _mean(ours),
        "ci95": list(accuracy_interval(ours, clusters)),
        "retention": retention,
        "retention_ci95": None if low is None else [low, high],
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(1, len(values))
