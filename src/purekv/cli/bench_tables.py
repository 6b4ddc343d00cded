"""Rows of a bench for people: a table of phases and one of the ablation for each prompt."""

from collections.abc import Iterable
from itertools import groupby
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from purekv.bench import BASELINES, FIRST_TOKENS, PARTS

_MIB = 2**20
_PHASES = {
    "decode_video": "reading video",
    "vision": "vision tower",
    "lm_prefill": "prefill",
    "ttft": "first token",
    "decode": "decoding",
}
_COMMON = ("decode_video", "vision")  # the same for every cache
_PARTS = {
    "setup": "set up",
    "scoring_source": "score,\nsource",
    "scoring_elsewhere": "score,\nothers",
    "certificate": "certi-\nficate",
    "selection": "select",
    "compaction": "gather",
    "dropping": "drop",
    "tail_rerun": "tail",
    "other": "other",
}
assert list(_PARTS) == list(PARTS)

Row = dict[str, Any]


def show(rows: list[Row]) -> None:
    """Print to stdout."""
    console = Console(highlight=False)
    for (tokens, batch), found in groupby(rows, key=lambda row: (row["tokens"], row["batch"])):
        prompt = list(found)
        if tokens is not None:
            console.print(f"\n{tokens} visual tokens, batch {batch}", style="bold")
        measured = [row for row in prompt if row["skipped"] is None]
        phases = [row for row in measured if row["what"] != "overhead"]
        overhead = [row for row in measured if row["what"] == "overhead"]
        if phases:
            console.print(_phases(phases))
        if overhead:
            console.print("What PureKV adds to prefill, ms, by first token")
            console.print(_overhead(overhead))
        for line in dict.fromkeys(_skipped(row) for row in prompt if row["skipped"]):
            console.print(line, markup=False)


def _phases(rows: list[Row]) -> Table:
    """One line a phase and method; the speed-ups over all baselines side by side."""
    ran = [name for name in BASELINES if any(row["baseline"] == name for row in rows)]
    table = _table("ms", "spread", "tok/s", "peak\nMiB", "KV\nMiB", *(f"vs\n{x}" for x in ran))
    for what, found in groupby(rows, key=lambda row: row["what"]):
        lines: dict[tuple[Any, ...], list[Row]] = {}
        for row in found:
            baseline = row["baseline"] if row["method"] == "full" else None
            lines.setdefault((*_method(row), baseline), []).append(row)
        title = f"[bold]{_PHASES[what]}[/]"
        if what not in _COMMON:
            table.add_row(title)
        for same in lines.values():
            row = same[0]
            over = {other["baseline"]: other["speedup"] for other in same}
            if row["method"] == "full":
                over = {}
            table.add_row(
                title if what in _COMMON else f"  {_name(row)}",
                _ms(row["ms"]),
                f"{(row['ms_max'] - row['ms_min']) / row['ms']:.0%}",
                "" if row["tok_s"] is None else f"{row['tok_s']:.1f}",
                f"{row['peak_bytes'] / _MIB:.0f}",
                "" if row["kv_bytes"] is None else f"{row['kv_bytes'] / _MIB:.1f}",
                *(f"{over[name]:.2f}x" if over.get(name) else "" for name in ran),
            )
    return table


def _overhead(rows: Iterable[Row]) -> Table:
    rows = list(rows)
    parts = [part for part in _PARTS if any(row["parts"][part] for row in rows)]
    table = _table("ms", "of\ndense", *(_PARTS[part] for part in parts))
    for first_token, found in groupby(
        sorted(rows, key=lambda row: FIRST_TOKENS.index(row["first_token"])),
        key=lambda row: row["first_token"],
    ):
        table.add_row(f"[bold]{first_token}[/]")
        for row in found:
            table.add_row(
                f"  {_name(row)}",
                _ms(row["ms"]),
                "" if row.get("share") is None else f"{row['share']:.1%}",
                *(_ms(row["parts"][part]) for part in parts),
            )
    return table


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _ms(value: float) -> str:
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f}"


def _method(row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("method", "prefill", "evict", "budget"))


def _name(row: Row) -> str:
    if row["method"] is None:
        return ""
    if row["method"] == "full":
        return f"full, {row['baseline']}"
    usual = {"prefill": "dense", "evict": "post"}
    unusual = [row[name] for name, value in usual.items() if row[name] != value]
    return " ".join([row["method"], *unusual, f"{row['budget']:g}"])


def _skipped(row: Row) -> str:
    name = _name(row) or _PHASES[row["what"]]
    return f"{name} skipped: {row['skipped']}"
