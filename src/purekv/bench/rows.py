"""Rows of a table of results: the same keys in every one, null where they say nothing."""

from collections.abc import Sequence
from statistics import median
from typing import Any

from purekv.bench.ablation import Ablation
from purekv.bench.phases import Measured
from purekv.config import PureKVConfig
from purekv.evals.methods import method_name

KEYS = (
    "what", "tokens", "batch", "method", "prefill", "evict", "scorer", "budget", "plan",
    "prune", "first_token", "ms", "ms_min", "ms_max", "repeats", "tok_s", "peak_bytes", "kv_bytes",
    "baseline", "speedup", "skipped",
)  # fmt: skip


def row(what: str, **values: Any) -> dict[str, Any]:
    return dict.fromkeys(KEYS) | {"what": what} | values


def method(config: PureKVConfig | None) -> dict[str, Any]:
    """What a row says of a method; without a config, of the dense full cache."""
    if config is None:
        return {"method": "full", "prefill": "dense", "budget": 1.0}
    names = ("prefill", "evict", "scorer", "budget", "plan", "prune", "first_token")
    return {"method": method_name(config)} | {name: getattr(config, name) for name in names}


def timing(measured: Sequence[Measured]) -> dict[str, Any]:
    """Median and spread of the passes; bytes of the worst."""
    times = [one.ms for one in measured]
    return {
        "ms": median(times),
        "ms_min": min(times),
        "ms_max": max(times),
        "repeats": len(times),
        "peak_bytes": max(one.peak_bytes for one in measured),
        "kv_bytes": measured[0].kv_bytes,
    }


def speedup(baseline: Sequence[Measured], ours: Sequence[Measured]) -> float:
    """Median over rounds of the baseline's time over ours, each of the same round."""
    return median(a.ms / b.ms for a, b in zip(baseline, ours, strict=True))


def overhead(ablations: Sequence[Ablation], dense: Sequence[Measured] | None) -> dict[str, Any]:
    """The median pass with its parts, so that they sum to its `ms`.

    `share` is that of the dense prefill's milliseconds, `speedup` of the whole prefill over it.
    """
    typical = sorted(ablations, key=lambda one: one.ms)[len(ablations) // 2]
    whole = [one.whole for one in ablations]
    values = timing(whole) | {
        "ms": typical.ms,
        "ms_min": min(one.ms for one in ablations),
        "ms_max": max(one.ms for one in ablations),
        "parts": typical.parts,
        "kv_bytes_peak": max(one.kv_bytes_peak for one in ablations),
    }
    if dense is not None:
        pairs = zip(ablations, dense, strict=True)
        values["baseline"] = "sdpa"
        values["speedup"] = speedup(dense, whole)
        values["share"] = median(one.ms / full.ms for one, full in pairs)
    return values
