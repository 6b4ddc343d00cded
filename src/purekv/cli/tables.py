"""What people read: answers side by side, then what they cost."""

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from purekv.cli.compare import Outcome, Request, Result
from purekv.evals.plots import row_name

_MIB = 2**20


def show(result: Result, request: Request) -> None:
    """Print one table of answers and one of costs to stdout."""
    console = Console(highlight=False)
    console.print(_answers(result, request))
    console.print(_costs(result))
    if result.agreement is not None:
        console.print(f"Equal answer tokens: {result.agreement:.0%}")


def _answers(result: Result, request: Request) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("Question", ratio=2)
    table.add_column("PureKV", ratio=1, style="bold")
    outcomes = [result.compressed]
    if result.dense is not None:
        table.add_column("Uncompressed", ratio=1)
        outcomes.append(result.dense)
    for index, question in enumerate(request.questions):
        answers = [_printable(outcome.answers[index].text) for outcome in outcomes]
        table.add_row(_printable(question), *answers)
    return table


def _costs(result: Result) -> Table:
    ours, dense = result.compressed, result.dense
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("")
    table.add_column("PureKV", justify="right", style="bold")
    if dense is not None:
        table.add_column("Uncompressed", justify="right")
        table.add_column("Ratio", justify="right")
    kept = None if dense is None else dense.kept_visual_tokens
    _add(table, "visual tokens", ours.kept_visual_tokens, kept)
    full = ours.kv_bytes_full
    _add(table, "KV cache, MiB", ours.kv_bytes_kept / _MIB, full / _MIB if dense else None)
    if dense is None:
        table.add_row("uncompressed, MiB", f"{full / _MIB:.1f}")
        table.add_row("compression", f"{ours.compression:.2f}x")
    peak = None if dense is None else dense.peak_bytes / _MIB
    _add(table, "peak memory, MiB", ours.peak_bytes / _MIB, peak)
    for phase, name in _PHASES.items():
        _add(table, f"{name}, s", ours.seconds[phase], _seconds(dense, phase))
    return table


_PHASES = {
    "decode_video": "reading video",
    "vision": "vision tower",
    "prefill": "prefill",
    "decode": "decode",
}


def _seconds(dense: Outcome | None, phase: str) -> float | None:
    # The file is read once for both.
    return None if dense is None or phase == "decode_video" else dense.seconds[phase]


def _add(table: Table, name: str, ours: float, dense: float | None) -> None:
    digits = 0 if isinstance(ours, int) else 1 if "MiB" in name else 2
    row = [name, f"{ours:.{digits}f}"]
    if dense is not None:
        row += [f"{dense:.{digits}f}", f"{dense / ours:.2f}x" if ours else ""]
    table.add_row(*row)


def _printable(text: str) -> Text:
    """A model may write anything, control codes of the terminal among it."""
    return Text("".join(char if char.isprintable() else " " for char in text))


def show_evaluation(rows: list[dict[str, Any]]) -> None:
    """Print one line a method and budget to stdout: what it keeps of the answers, what it costs."""
    quality, cost = (Table(box=box.SIMPLE_HEAD) for _ in range(2))
    for table, names in (
        (quality, ("n", "Accuracy", "Retention", "2nd turn", "p", "KL")),
        (cost, ("KV, MiB", "Prefill, s", "Decode, tok/s")),
    ):
        table.add_column("Method", no_wrap=True)
        table.add_column("Budget", justify="right", no_wrap=True)
        for name in names:
            table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        later = row["second_turn"]
        label = (row_name(row), f"{row['budget']:g}")
        quality.add_row(
            *label,
            str(row["n"]),
            _share(row["accuracy"], row["ci95"]),
            _share(row["retention"], row["retention_ci95"]),
            _share(later["accuracy"] if later else None),
            f"{row['mcnemar_p']:.2g}",
            f"{row['kl']:.3g}",
        )
        cost.add_row(
            *label,
            f"{row['kv_bytes'] / _MIB:.1f}",
            f"{row['prefill_s']:.2f}" if "prefill_s" in row else "-",
            f"{row['decode_tok_s']:.1f}" if "decode_tok_s" in row else "-",
        )
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=120)
    console.print(quality)
    if "cider" in rows[0]:
        console.print(_free_text(rows))
    console.print(cost)


def _free_text(rows: list[dict[str, Any]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("Method", no_wrap=True)
    for name in ("Budget", "n", "CIDEr", "Retention", "ROUGE-L", "Retention"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        cells = [row_name(row), f"{row['budget']:g}", str(row["cider"]["n"])]
        for metric in (row["cider"], row["rouge_l"]):
            cells.append(_share(metric["score"], metric["ci95"]))
            cells.append(_share(metric["retention"], metric["retention_ci95"]))
        table.add_row(*cells)
    return table


def _share(value: float | None, bounds: list[float] | None = None) -> str:
    if value is None:
        return "-"
    interval = f" [{bounds[0]:.2f}, {bounds[1]:.2f}]" if bounds else ""
    return f"{value:.3f}{interval}"
