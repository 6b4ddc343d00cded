"""Fill the tables of README.md and docs/ from benchmarks/results/, so that they cannot drift.

    python benchmarks/tables.py           # rewrite what stands between the marks
    python benchmarks/tables.py --check   # fail if a table is not what the results say

A mark is `<!-- table: NAME FILE.json -->`; the table ends at `<!-- end -->`.
"""

import argparse
import json
import re
import sys
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
    for name in dict.fromkeys(row["method"] for row in rows[1:]):
        cells = []
        for budget in budgets:
            found = [r for r in rows if (r["method"], r["budget"]) == (name, budget)]
            cells.append(_kept(found[0][part] if part else found[0]) if found else "")
        lines.append([f"`{name}`", *cells])
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
        title = "full, accuracy" if key == "accuracy" else f"`{row['method']}`, retention"
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
        lines.append([f"`{row['method']}`", *cells])
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


TABLES: dict[str, Callable[[Rows], str]] = {
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
    data = json.loads((ROOT / "benchmarks" / "results" / file).read_text(encoding="utf-8"))
    return opening + TABLES[name](data["rows"]) + closing


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
