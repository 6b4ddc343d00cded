"""Retention against prefill time: the picture of docs/planner.md, and the rows of its table.

    python benchmarks/frontier.py            # draws docs/frontier.svg

Times are those of 65,536 visual tokens at Qwen2.5-VL-7B's shapes on one H200, retention is that of
the two reference models on their suite of about 4,000 tokens, first token included.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import RESULTS

TIMED = ("methods_long.json", "sparse_prefill_h200.json", "pruned.json", "pruned_clie.json")
# The first that has a way: all modes, then eviction alone.
QUALITY = {
    "embedded model": ("modes_4k.json", "reference_4k.json"),
    "second model": ("second_modes_4k.json", "second_4k.json"),
}
TOKENS = 65536
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Way:
    """One way to compute or keep less, as its rows have it."""

    name: str
    method: str
    budget: float
    evict: str | None = None
    prefill: str = "dense"
    sources: Any = "auto"
    planned: bool = False
    prune: float | None = None
    timed_as: dict[str, Any] = field(default_factory=dict)
    """What the row of its time has otherwise: one that computes as many tokens."""


WAYS = (
    Way("dense, full cache", "full", 1.0, sources=None),
    Way("eviction to 20%, `clie`", "clie", 0.2, "post"),
    Way("eviction to 20%, planned", "clie_rare", 0.2, "post", planned=True,
        timed_as={"method": "clie"}),
    Way("eviction to 20%, `snapkv`", "snapkv", 0.2, "post"),
    Way("sparse attention, untuned", "clie", 1.0, "post", "spatiotemporal"),
    Way("35% behind layer 5, sparse below", "clie", 0.35, "drop", "spatiotemporal", [5]),
    Way("20% behind layer 2, sparse below", "clie", 0.2, "drop", "spatiotemporal", [2]),
    Way("10% behind layer 2, sparse below", "clie", 0.1, "drop", "spatiotemporal", [2]),
    Way("20% behind layer 2, `fastv`", "fastv", 0.2, "drop", sources=[2]),
    Way("40% that do not repeat: **speed plan**", "evs", 0.4, "drop"),
    Way("40% that do not repeat, then 10% of all, planned", "clie_rare", 0.1, "post", planned=True,
        prune=0.4),
    Way("20% that do not repeat", "evs", 0.2, "drop"),
    Way("one frame in five", "frames", 0.2, sources=None,
        timed_as={"method": "evs", "evict": "drop"}),
)  # fmt: skip


def read(*names: str) -> Rows:
    return [row for name in names for row in json.loads((RESULTS / name).read_text())["rows"]]


def timed(way: Way) -> tuple[float, float]:
    """Milliseconds, and the speed-up over the dense prefill of the same run."""
    wanted = {"what": "lm_prefill", "method": way.method, "tokens": TOKENS, "budget": way.budget,
              "prefill": way.prefill, "evict": way.evict, "baseline": "sdpa",
              "prune": way.prune}  # fmt: skip
    dense = wanted | {"method": "full", "budget": 1.0, "prefill": "dense", "evict": None,
                      "prune": None}  # fmt: skip
    for rows in map(read, TIMED):
        for row in rows:
            if _has(row, wanted | way.timed_as):
                (base,) = (one for one in rows if _has(one, dense))
                return row["ms"], base["ms"] / row["ms"]
    raise KeyError(way.name)


def quality(way: Way, rows: Rows) -> dict[str, Any] | None:
    """The first row that says what that way retains."""
    wanted = {"what": "quality", "method": way.method, "budget": way.budget,
              "prefill": way.prefill, "evict": way.evict, "prune": way.prune}  # fmt: skip
    for row in rows:
        same = way.planned or row["source_layers"] == way.sources
        if _has(row, wanted) and bool(row["plan"]) == way.planned and same:
            return row
    return None


def _has(row: dict[str, Any], wanted: dict[str, Any]) -> bool:
    """Whether a row is what is wanted; what it does not name, it does not do."""
    return all(row.get(name) == value for name, value in wanted.items())


def table() -> list[list[str]]:
    """Cells: what is done, milliseconds, speed-up, and what each model retains."""
    lines = [["prefill", "64k, ms", "speed-up", *QUALITY]]
    for way in WAYS:
        ms, speedup = timed(way)
        cells = [way.name, f"{ms:,.0f}", f"{speedup:.2f}x"]
        for names in QUALITY.values():
            row = quality(way, read(*names))
            cells.append("1" if way.method == "full" else "" if row is None else _retention(row))
        lines.append(cells)
    return lines


def _retention(row: dict[str, Any]) -> str:
    low, high = row["retention_ci95"]
    return f"{row['retention']:.3f} [{low:.3f}, {high:.3f}]"


def draw(path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(QUALITY), figsize=(11, 5.2), sharey=True)
    for plot, (model, names) in zip(axes, QUALITY.items(), strict=True):
        rows = read(*names)
        for number, way in enumerate(WAYS):
            row, name = quality(way, rows), way.name.replace("`", "").replace("*", "")
            if row is None:
                continue
            low, high = row["retention_ci95"]
            error = [[row["retention"] - low], [high - row["retention"]]]
            ms, _ = timed(way)
            marker = "*" if "speed plan" in name else "osD^vP"[number % 6]
            plot.errorbar(ms, row["retention"], yerr=error, marker=marker, ms=9, ls="", label=name)
        plot.axvline(timed(WAYS[0])[0] / 3.16, color="grey", lw=0.8, ls=":")
        plot.axhline(0.97, color="grey", lw=0.8, ls=":")
        plot.set(title=model, xscale="log", xlabel="prefill of 65,536 visual tokens, ms (H200)")
        plot.set_ylim(0.75, 1.02)
    axes[0].set_ylabel("retention, about 4,000 visual tokens")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncol=3, fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.17, 1, 1))
    plt.rcParams["svg.hashsalt"] = "purekv"
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    draw(RESULTS.parents[1] / "docs" / "frontier.svg")
