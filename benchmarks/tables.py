"""Fill the tables of README.md and docs/ from benchmarks/results/, so that they cannot drift.

    python benchmarks/tables.py           # rewrite what stands between the marks
    python benchmarks/tables.py --check   # fail if a table is not what the results say

A mark is `<!-- table: NAME FILE.json -->`, or with files joined by +; it ends at `<!-- end -->`.
"""

import argparse
import json
import re
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MARK = re.compile(r"(<!-- table: (\w+) (\S+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)

Rows = list[dict[str, Any]]


def retention(rows: Rows, part: str | None = None) -> str:
    """Methods by budgets: accuracy over the full cache's, with its 95% interval."""
    full = rows[0]
    budgets = sorted({row["budget"] for row in rows[1:]}, reverse=True)
    accuracy = full[part] if part else full
    lines = [
        ["cache", *(f"{budget:.0%}" for budget in budgets)],
        ["---"] * (1 + len(budgets)),
        [
            f"full: accuracy {accuracy['accuracy']:.3f} "
            f"[{accuracy['ci95'][0]:.3f}, {accuracy['ci95'][1]:.3f}], n = {accuracy['n']}",
            *([""] * len(budgets)),
        ],
    ]
    for name in dict.fromkeys(map(_name, rows[1:])):
        cells = []
        for budget in budgets:
            found = [r for r in rows if (_name(r), r["budget"]) == (name, budget)]
            cells.append(_kept(found[0][part] if part else found[0]) if found else "")
        lines.append([name, *cells])
    return _markdown(lines)


def later(rows: Rows) -> str:
    """The same for second and third questions alone."""
    return retention(rows, "second_turn")


def categories(rows: Rows) -> str:
    """The full cache's accuracy by category, and what each method keeps of it at 20%."""
    names = list(rows[0]["by_category"])
    lines = [["cache", *names], ["---"] * (1 + len(names))]
    for row in rows:
        if row["budget"] not in (1.0, 0.2):
            continue
        key = "accuracy" if row["method"] == "full" else "retention"
        cells = [row["by_category"][name][key] for name in names]
        title = "full, accuracy" if key == "accuracy" else f"{_name(row)}, retention"
        lines.append([title, *("-" if cell is None else f"{cell:.2f}" for cell in cells)])
    counts = [str(rows[0]["by_category"][name]["n"]) for name in names]
    return _markdown([*lines, ["answers", *counts]])


def divergence(rows: Rows) -> str:
    """Mean KL divergence from the full cache's next token, in nats, and equal bytes."""
    lines = [["cache", "budget", "KV bytes, share of full", "KL, nats", "equal next token"]]
    lines.append(["---"] * 5)
    for row in rows[1:]:
        if row["budget"] not in (0.2, 0.1, 0.05):
            continue
        share = row["kv_bytes"] / rows[0]["kv_bytes"]
        cells = [
            f"{row['budget']:.0%}",
            f"{share:.3f}",
            f"{row['kl']:.3g}",
            f"{row['agreement']:.3f}",
        ]
        lines.append([_name(row), *cells])
    return _markdown(lines)


def difficulty(rows: Rows) -> str:
    """Accuracy of the full cache by category; what random and streaming eviction keep at 20%."""
    full = rows[0]["by_category"]
    lines = [["", *full], ["---"] * (1 + len(full))]
    lines.append(["full, accuracy", *(f"{part['accuracy']:.3f}" for part in full.values())])
    for row in rows:
        if row["method"] in ("random", "streaming") and row["budget"] == 0.2:
            kept = (row["by_category"][name]["retention"] for name in full)
            lines.append([f"`{row['method']}`, retention", *(f"{share:.2f}" for share in kept)])
    lines.append(["answers", *(str(part["n"]) for part in full.values())])
    return _markdown(lines)


WAYS = {
    ("dense", None, 1.0): "dense, full cache",
    ("spatiotemporal", "post", 1.0): "sparse attention, all tokens computed",
    ("dense", "drop", 0.2): "20% go on behind layer 2",
    ("spatiotemporal", "drop", 0.2): "the same, sparse up to there",
    ("spatiotemporal", "drop", 0.1): "10% go on behind layer 2, sparse up to there",
    ("spatiotemporal", "drop", 0.35): "35% go on behind layer 4, sparse up to there",
}


def prefill(rows: Rows) -> str:
    """Prefill by length, with the speed-up over SDPA's default, beside what each way retains."""
    suites: dict[int, dict[tuple[Any, ...], dict[str, Any]]] = defaultdict(dict)
    for row in rows:
        if row["what"] == "quality" and _early(row):
            suites[round(row["tokens"] / 1000)][_way(row)] = row
    timed = [r for r in rows if r["what"] == "lm_prefill" and r["baseline"] == "sdpa"]
    lengths = sorted({row["tokens"] for row in timed})
    heads = ["prefill", *(f"{tokens // 1024}k, ms" for tokens in lengths)]
    heads += [f"retention at {thousands}k" for thousands in sorted(suites)]
    lines = [heads, ["---"] * len(heads)]
    for way, name in _measured(timed).items():
        cells = [name]
        for tokens in lengths:
            (row,) = (r for r in timed if r["tokens"] == tokens and _way(r) == way)
            times = "" if row["evict"] is None else f" (**{row['speedup']:.2f}x**)"
            cells.append(f"{row['ms']:,.0f}{times}")
        kept = [_kept(quality[way]) if way[1] else "1" for _, quality in sorted(suites.items())]
        lines.append([*cells, *kept])
    return _markdown(lines)


def frontier(rows: Rows) -> str:
    """What saves prefill time, beside what both models retain; `frontier.py` knows its files."""
    from frontier import table  # a neighbour, found where this file is run as a script

    lines = table()
    return _markdown([lines[0], ["---"] * len(lines[0]), *lines[1:]])


def _measured(rows: Rows) -> dict[tuple[Any, ...], str]:
    """Those of `WAYS` that the rows have."""
    ways = set(map(_way, rows))
    return {way: name for way, name in WAYS.items() if way in ways}


def _way(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["prefill"], row["evict"], row["budget"]


def _early(row: dict[str, Any]) -> bool:
    return row["method"] in ("full", "clie") and row["source_layers"] in (None, "auto", [2])


def modes(rows: Rows) -> str:
    """What each way to compute less retains, by category."""
    names = list(rows[0]["by_category"])
    heads = ["method", "prefill", "evict", "sources", "budget", "retention", *names]
    lines = [heads, ["---"] * len(heads)]
    for row in rows[1:]:
        sources = row["source_layers"]
        where = sources if isinstance(sources, str) else ", ".join(map(str, sources or ["-"]))
        parts = [f"{row['by_category'][name]['retention']:.2f}" for name in names]
        name = _name(row) + (f", `prune={row['prune']}`" if row.get("prune") else "")
        cells = [name, row["prefill"], row["evict"] or "-", where]
        lines.append([*cells, f"{row['budget']:.0%}", _kept(row), *parts])
    return _markdown(lines)


def baselines(rows: Rows) -> str:
    """Prefill again: speed-ups over SDPA's default and over FlashAttention-2, and peak memory."""
    timed = [r for r in rows if r["what"] == "lm_prefill" and not r["skipped"]]
    lines = [["prefill", "tokens", "ms", "over SDPA", "over FlashAttention-2", "peak, GB"]]
    lines.append(["---"] * 6)
    for tokens in sorted({row["tokens"] for row in timed}):
        for way, name in _measured(timed).items():
            pair = {r["baseline"]: r for r in timed if r["tokens"] == tokens and _way(r) == way}
            ours, flash = pair["sdpa"], pair["flash"]
            over = f"{flash['speedup']:.2f}"
            if ours["evict"] is None:
                over = f"{flash['ms'] / ours['ms']:.2f}"
            cells = [name, str(tokens), f"{ours['ms']:,.0f}", f"{ours['speedup']:.2f}", over]
            lines.append([*cells, f"{ours['peak_bytes'] / 1e9:.1f}"])
    return _markdown(lines)


def predicted(rows: Rows) -> str:
    """The cost model against the same prefills."""
    from purekv.planning.cost import CostModel

    lines = [["prefill", "tokens", "measured, ms", "cost model, ms", ""], ["---"] * 5]
    for row in rows:
        if (row["what"], row["baseline"]) != ("lm_prefill", "sdpa"):
            continue
        layers, text = 28, 80  # as sparse_prefill.py runs them
        cost, seen = CostModel(), row["tokens"] + text
        tile = 2 * (row["prefill"] == "spatiotemporal")
        if row["evict"] == "drop":
            behind = 4 if row["budget"] == 0.35 else 2
            ms = cost.dropping(layers, behind, seen, row["budget"] * row["tokens"] + text, tile)
        else:
            ms = cost.prefill([seen] * layers, [tile] * layers)
        cells = [WAYS[_way(row)], str(row["tokens"]), f"{row['ms']:,.0f}", f"{ms:,.0f}"]
        lines.append([*cells, f"{ms / row['ms'] - 1:+.1%}"])
    return _markdown(lines)


def longest(rows: Rows) -> str:
    """How long a prompt fits, until memory ends."""
    lines = [["tokens", "go on", "prefill, ms", "peak, GB", "KV cache, GB"], ["---"] * 5]
    for row in rows:
        cells = [f"{row['tokens']:,}", f"{row['budget']:.0%}"]
        if row["skipped"]:
            lines.append([*cells, row["skipped"], "", ""])
            continue
        sizes = (row["peak_bytes"], row["kv_bytes"])
        lines.append([*cells, f"{row['ms']:,.0f}", *(f"{size / 1e9:.1f}" for size in sizes)])
    return _markdown(lines)


def automatic(rows: Rows) -> str:
    """The bare model, and PureKV attached where it changes nothing or little."""
    lines = [["tokens", "bare model, ms", "PureKV attached, ms", "bare over attached"]]
    lines.append(["---"] * 4)
    for bare, ours in zip(rows[::2], rows[1::2], strict=True):
        times = (
            f"{row['ms']:.1f} [{row['ms_min']:.1f}, {row['ms_max']:.1f}]" for row in (bare, ours)
        )
        lines.append([f"{bare['tokens']:,}", *times, f"{ours['speedup']:.3f}"])
    return _markdown(lines)


def methods(rows: Rows) -> str:
    """Language-model prefill of every method, eviction included."""
    found = [row for row in rows if row["what"] == "lm_prefill" and not row["skipped"]]
    lengths = sorted({row["tokens"] for row in found})
    heads = ["cache", *(f"{tokens // 1024}k, ms" for tokens in lengths)]
    lines = [heads, ["---"] * len(heads)]
    for name in dict.fromkeys(row["method"] for row in found):
        cells = []
        for tokens in lengths:
            here = [r for r in found if (r["method"], r["tokens"]) == (name, tokens)]
            over = f" ({here[0]['speedup']:.2f}x)" if here and name != "full" else ""
            cells.append(f"{here[0]['ms']:,.0f}{over}" if here else "")
        lines.append([f"`{name}`", *cells])
    return _markdown(lines)


def layer(rows: Rows) -> str:
    """One attention layer: dense by three kernels, sparse by tile."""
    found = [row for row in rows if row["what"] == "attention_layer"]
    lines = [
        ["tokens", "attention", "ms", "TFLOP/s", "over SDPA", "over FlashAttention-2", "pairs"]
    ]
    lines.append(["---"] * 7)
    for tokens in sorted({row["tokens"] for row in found}):
        here = [row for row in found if row["tokens"] == tokens]
        dense = {row["baseline"]: row for row in here if row["prefill"] == "dense"}
        for name, row in dense.items():
            if row["skipped"]:
                lines.append([str(tokens), f"dense, {name}", row["skipped"], "", "", "", ""])
                continue
            over = [f"{dense[b]['ms'] / row['ms']:.2f}" for b in ("sdpa", "flash")]
            rate = f"{row['tflop_s']:.0f}"
            lines.append([str(tokens), f"dense, {name}", f"{row['ms']:.2f}", rate, *over, "1"])
        for tile in sorted({row["tile"] for row in here if "tile" in row}):
            ours = {row["baseline"]: row for row in here if row.get("tile") == tile}
            row = ours["sdpa"]
            over = [f"{ours[b]['speedup']:.2f}" for b in ("sdpa", "flash")]
            cells = [f"{row['ms']:.2f}", f"{row['tflop_s']:.0f}", *over, f"{row['pairs']:.3f}"]
            lines.append([str(tokens), f"sparse, tile {tile}", *cells])
    return _markdown(lines)


def overhead(rows: Rows) -> str:
    """PureKV's own code inside one prefill, by method."""
    names = ["method", "budget", "first token", "ms", "share of the dense prefill", "scoring"]
    lines = [[*names, "selection", "compaction", "question again"], ["---"] * 9]
    for row in (row for row in rows if row["what"] == "overhead"):
        parts = row["parts"]
        scoring = parts["scoring_source"] + parts["scoring_elsewhere"]
        cells = [f"`{row['method']}`", f"{row['budget']:.0%}", row["first_token"]]
        cells += [f"{row['ms']:.1f}", f"{row['share']:.1%}", f"{scoring:.1f}"]
        numbers = (parts[name] for name in ("selection", "compaction", "tail_rerun"))
        lines.append([*cells, *(f"{ms:.1f}" for ms in numbers)])
    return _markdown(lines)


def decode(rows: Rows) -> str:
    """Steps of decoding, by batch and how they were launched."""
    found = [row for row in rows if row["what"] == "decode" and not row["skipped"]]
    heads = ["batch", "cache", "launch", "ms a step", "tokens/s", "share of roofline", "KV, GB"]
    heads += ["over `dynamic`", "over `preallocated`", "over `preallocated_packed`"]
    lines = [heads, ["---"] * len(heads)]
    seen = set()
    for row in found:
        name = f"full, `{row['baseline']}`" if row["method"] == "full" else _cache_name(row)
        key = row["batch"], name, row["launch"]
        if key in seen:
            continue
        seen.add(key)
        over = []
        for baseline in ("dynamic", "preallocated", "preallocated_packed"):
            same = [
                r for r in found
                if r["baseline"] == baseline and row["method"] != "full"
                and (r["batch"], _cache_name(r), r["launch"]) == key
            ]  # fmt: skip
            over.append(f"{same[0]['speedup']:.2f}" if same else "")
        share = f"{row['roofline_ms'] / row['ms']:.0%}"
        cells = [str(row["batch"]), name, row["launch"], f"{row['ms']:.2f}", f"{row['tok_s']:.0f}"]
        lines.append([*cells, share, f"{row['kv_bytes'] / 1e9:.2f}", *over])
    return _markdown(lines)


def _cache_name(row: dict[str, Any]) -> str:
    spread = "" if row.get("allocation") in (None, "uniform") else f", `{row['allocation']}`"
    return f"{row['budget']:.0%}{spread}"


def tensor(rows: Rows) -> str:
    """Prefill on one GPU and on two, and what PureKV's own collectives take."""
    found = [row for row in rows if row["what"] == "lm_prefill"]
    heads = ["prefill", "tokens", "one GPU, ms", "two GPUs, ms", "ratio", "of the dense ratio"]
    lines = [[*heads, "own collectives", "peak a GPU, GB"], ["---"] * 8]
    for two in (row for row in found if row["gpus"] == 2):
        one = _on_one(found, two)
        cells = [TENSOR[_way(two)], str(two["tokens"])]
        if one is None:
            cells += ["", f"{two['ms']:,.0f}", "", ""]
        else:
            ratio = one["ms"] / two["ms"]
            (dense,) = (
                row for row in found
                if row["gpus"] == 2 and row["tokens"] == two["tokens"] and row["evict"] is None
            )  # fmt: skip
            other = _on_one(found, dense)
            assert other is not None
            share = ratio / (other["ms"] / dense["ms"])
            cells += [f"{one['ms']:,.0f}", f"{two['ms']:,.0f}", f"{ratio:.2f}", f"{share:.0%}"]
        collectives = "" if two["evict"] is None else f"{two['collective_ms'] / two['ms']:.3%}"
        lines.append([*cells, collectives, f"{two['peak_bytes'] / 1e9:.1f}"])
    return _markdown(lines)


TENSOR = WAYS | {
    ("dense", "post", 0.2): "20% kept",
    ("spatiotemporal", "post", 0.2): "20% kept, sparse attention",
}


def _on_one(rows: Rows, two: dict[str, Any]) -> dict[str, Any] | None:
    same = [
        row for row in rows
        if row["gpus"] == 1 and (row["tokens"], _way(row)) == (two["tokens"], _way(two))
    ]  # fmt: skip
    return same[0] if same else None


def vision(rows: Rows) -> str:
    """The tower: transformers' loop against grouped calls."""
    lines = [["tokens", "frame", "loop, ms", "calls", "grouped, ms", "calls", "speed-up"]]
    lines.append(["---"] * 7)
    for loop, ours in zip(rows[::2], rows[1::2], strict=True):
        cells = [str(loop["tokens"]), f"{loop['side']} x {loop['side']}"]
        cells += [f"{loop['ms']:,.0f}", f"{loop['calls']:,}", f"{ours['ms']:,.0f}"]
        lines.append([*cells, str(ours["calls"]), f"{ours['speedup']:.2f}"])
    return _markdown(lines)


TABLES: dict[str, Callable[[Rows], str]] = {
    "prefill": prefill,
    "modes": modes,
    "frontier": frontier,
    "baselines": baselines,
    "predicted": predicted,
    "layer": layer,
    "longest": longest,
    "automatic": automatic,
    "methods": methods,
    "decode": decode,
    "overhead": overhead,
    "tensor": tensor,
    "vision": vision,
    "retention": retention,
    "later": later,
    "categories": categories,
    "divergence": divergence,
    "difficulty": difficulty,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    stale = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        filled = MARK.sub(_fill, text)
        if filled == text:
            continue
        stale.append(page.relative_to(ROOT).as_posix())
        if not check:
            page.write_text(filled, encoding="utf-8")
    if stale and check:
        sys.exit(f"not what the results say: {', '.join(stale)}; run python benchmarks/tables.py")


def _fill(match: re.Match[str]) -> str:
    opening, name, file, _, closing = match.groups()
    results = ROOT / "benchmarks" / "results"
    texts = [(results / one).read_text(encoding="utf-8") for one in file.split("+")]
    return (
        opening
        + TABLES[name]([row for text in texts for row in json.loads(text)["rows"]])
        + closing
    )


def _name(row: dict[str, Any]) -> str:
    """A method, or what a plan makes of one."""
    return f"`{row['method']}`" + (", planned" if row.get("plan") else "")


def _kept(part: dict[str, Any]) -> str:
    """The retention, "-" where the full cache was never right; its interval, if it has one."""
    if part["retention"] is None:
        return "-"
    interval = part["retention_ci95"]
    bounds = f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else ""
    return f"{part['retention']:.3f}{bounds}"


def _markdown(lines: list[list[str]]) -> str:
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    main()
