"""Pictures of an evaluation's folder: each as PNG and SVG, and `index.html` that shows them.

Every number comes from the rows of `results.json` and, where it is there, `timing.json`.
Matplotlib is imported where it is used: an evaluation without pictures needs none.
"""

import html
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from purekv.errors import PureKVError
from purekv.evals.summary import FULL

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = Mapping[str, Any]

# Okabe and Ito's colours, told apart with any colour vision; yellow is too pale for lines on white.
# Markers differ as well, and go on where the colours begin anew.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
_MARKERS = "osD^vP*X<>"
_WIDTH = 8.0  # inches; fonts are sized for a picture shown 800 pixels wide
_STYLE: dict[Any, Any] = {
    "font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True,
    "grid.color": "#e3e7ea", "svg.hashsalt": "purekv", "figure.constrained_layout.use": True,
}  # fmt: skip
_MIB = 2**20


def require_matplotlib() -> None:
    """Raises PureKVError, which says how to get it, where it is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise PureKVError(
            "pictures need matplotlib; run pip install purekv[plots], or leave --plots out"
        ) from None


def row_name(row: Row) -> str:
    """A method, with what is unusual about it."""
    usual = {"prefill": ("dense",), "evict": ("post", None)}
    unusual = [str(row[name]) for name, values in usual.items() if row[name] not in values]
    return " ".join([row["method"], *unusual])


def read_rows(directory: Path) -> list[dict[str, Any]]:
    """The rows of an evaluation, with seconds where they were measured.

    Raises:
        PureKVError: no whole evaluation is there.
    """
    try:
        rows = json.loads((directory / "results.json").read_text(encoding="utf-8"))["rows"]
    except FileNotFoundError:
        raise PureKVError(
            f"{directory} has no results.json; run purekv eval with --out {directory} first"
        ) from None
    timing = directory / "timing.json"
    if timing.exists():
        times = json.loads(timing.read_text(encoding="utf-8"))
        rows = [row | seconds for row, seconds in zip(rows, times, strict=True)]
    return rows


def write_plots(directory: Path) -> Path:
    """Draw what is in an evaluation's folder, into it; returns the path of the page."""
    require_matplotlib()
    rows = read_rows(directory)
    drawn = []
    with _style():
        for name, (title, draw) in _PICTURES.items():
            figure = draw(rows)
            if figure is not None:
                _save(figure, directory / name)
                drawn.append((name, title))
    page = directory / "index.html"
    _replace(page, lambda path: path.write_text(_page(rows, drawn), encoding="utf-8"))
    return page


def accuracy_by_budget(rows: Sequence[Row]) -> "Figure | None":
    """A line a method; the full cache's accuracy and its interval as a band."""
    budgets = sorted({_share(row) for row in rows if row["method"] != FULL})
    if not budgets:
        return None
    figure, axes = _axes(4.8)
    names = _names(rows)
    _full_band(axes, rows)
    for number, name in enumerate(names):
        found = sorted((row for row in rows if row_name(row) == name), key=_share)
        # Side by side, so that intervals do not hide one another.
        shift = 0.5 * ((number + 0.5) / len(names) - 0.5)
        places = [budgets.index(_share(row)) + shift for row in found]
        _points(axes, places, found, number, name, linestyle="-")
    axes.set_xticks(range(len(budgets)), [f"{budget:.3g}%" for budget in budgets])
    axes.set_xlim(-0.5, len(budgets) - 0.5)
    axes.set_xlabel("visual tokens kept")
    axes.set_ylabel("accuracy, 95% interval")
    _legend(axes)
    return figure


def accuracy_by_prefill(rows: Sequence[Row]) -> "Figure | None":
    """A point a method and budget; None without timing."""
    found = [row for row in rows if "prefill_s" in row]
    if not found:
        return None
    figure, axes = _axes(4.8)
    budgets = sorted({_share(row) for row in found if row["method"] != FULL})
    sizes = {
        budget: 4 + 6 * place / max(1, len(budgets) - 1) for place, budget in enumerate(budgets)
    }
    for row in found:
        if row["method"] == FULL:
            _points(axes, [row["prefill_s"]], [row], None, "full cache", markersize=8)
    for number, name in enumerate(_names(rows)):
        for row in found:
            if row_name(row) == name:
                size = sizes[_share(row)]
                _points(axes, [row["prefill_s"]], [row], number, None, markersize=size)
        _points(axes, [], [], number, name)  # of the legend
    for budget, size in sizes.items():
        axes.plot([], [], "o", color="none", mec="#5b6670", ms=size, label=f"{budget:.3g}% kept")
    axes.set_xlabel("prefill, seconds (median)")
    axes.set_ylabel("accuracy, 95% interval")
    _legend(axes)
    return figure


def retention_by_category(rows: Sequence[Row]) -> "Figure | None":
    """Methods by categories, at the smallest budget."""
    found = [row for row in rows if row["method"] != FULL]
    if not found:
        return None
    budget = min(_share(row) for row in found)
    found = [row for row in found if _share(row) == budget]
    categories = list(found[0]["by_category"])
    values = [
        [_number(row["by_category"][category]["retention"]) for category in categories]
        for row in found
    ]
    figure, axes = _axes(1.6 + 0.42 * len(found) + 0.9)
    axes.grid(False)
    axes.set_facecolor("#e8ecef")  # seen where there is no retention: nothing was right before
    image = axes.imshow(values, cmap="cividis", vmin=0, vmax=1, aspect="auto")
    size = min(10, max(6, 80 / len(categories)))
    for y, line in enumerate(values):
        for x, value in enumerate(line):
            text = "-" if value != value else f"{value:.2f}"
            colour = "white" if value < 0.45 else "black"
            axes.text(x, y, text, ha="center", va="center", color=colour, fontsize=size)
    counts = [found[0]["by_category"][category]["n"] for category in categories]
    labels = [f"{name or 'none'} (n={n})" for name, n in zip(categories, counts, strict=True)]
    axes.set_xticks(range(len(categories)), labels, rotation=35, ha="right", fontsize=9)
    axes.set_yticks(range(len(found)), [row_name(row) for row in found])
    axes.tick_params(length=0)
    axes.set_title(f"{budget:.3g}% of the visual tokens kept", fontsize=10)
    figure.colorbar(image, ax=axes, label="retention", pad=0.01, extend="max")
    return figure


_COSTS = (
    ("kv_bytes", "KV cache, MiB", _MIB, "{:.1f}"),
    ("prefill_s", "prefill, s", 1, "{:.2f}"),
    ("decode_tok_s", "decode, tokens/s", 1, "{:.1f}"),
)


def costs(rows: Sequence[Row]) -> "Figure | None":
    """Bars of bytes and, with timing, of prefill and decode."""
    from matplotlib.figure import Figure

    columns = [column for column in _COSTS if column[0] in rows[0]]
    figure = Figure(figsize=(_WIDTH, 1.0 + 0.24 * len(rows)))
    panels = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    names = _names(rows)
    colours = [
        "#5b6670" if row["method"] == FULL else _COLOURS[names.index(row_name(row)) % len(_COLOURS)]
        for row in rows
    ]
    for axes, (key, title, unit, style) in zip(panels, columns, strict=True):
        values = [row[key] / unit for row in rows]
        bars = axes.barh(range(len(rows)), values, color=colours, height=0.75)
        axes.bar_label(bars, [style.format(value) for value in values], padding=3, fontsize=8)
        axes.set_xlim(0, 1.3 * max(values))
        axes.set_xlabel(title)
        axes.grid(axis="x")
    labels = [FULL if row["method"] == FULL else f"{row_name(row)}, {_budget(row)}" for row in rows]
    panels[0].set_yticks(range(len(rows)), labels, fontsize=9)
    panels[0].set_ylim(len(rows) - 0.4, -0.6)
    return figure


_PICTURES: dict[str, tuple[str, Callable[[Sequence[Row]], "Figure | None"]]] = {
    "accuracy": ("Accuracy against budget", accuracy_by_budget),
    "accuracy_prefill": ("Accuracy against prefill time", accuracy_by_prefill),
    "categories": ("Retention by category", retention_by_category),
    "costs": ("Memory and time", costs),
}


@contextmanager
def _style() -> Iterator[None]:
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        yield


def _axes(height: float) -> "tuple[Figure, Axes]":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, height))
    axes = figure.subplots()
    axes.grid(axis="y")
    return figure, axes


def _names(rows: Sequence[Row]) -> list[str]:
    """Of the methods, in order; a method's place decides its colour in all pictures."""
    return list(dict.fromkeys(row_name(row) for row in rows if row["method"] != FULL))


def _share(row: Row) -> float:
    """The budget as a percentage of the visual tokens, to four digits."""
    budget = row["budget"]
    share = budget if isinstance(budget, float) else budget / max(1, row["tokens"])
    return float(f"{100 * share:.4g}")


def _budget(row: Row) -> str:
    budget = row["budget"]
    return f"{100 * budget:.3g}%" if isinstance(budget, float) else f"{budget} tokens"


def _points(
    axes: "Axes",
    x: Sequence[float],
    rows: Sequence[Row],
    number: int | None,
    label: str | None,
    **style: Any,
) -> None:
    """Accuracies with their intervals; `number` is the method's, None the full cache's."""
    y = [row["accuracy"] for row in rows]
    low = [max(0.0, row["accuracy"] - row["ci95"][0]) for row in rows]
    high = [max(0.0, row["ci95"][1] - row["accuracy"]) for row in rows]
    usual = {"linestyle": "none", "markersize": 6, "elinewidth": 1, "capsize": 2, "linewidth": 1.3}
    chosen: dict[str, Any] = usual | style
    axes.errorbar(
        x,
        y,
        yerr=[low, high],
        color="#5b6670" if number is None else _COLOURS[number % len(_COLOURS)],
        marker="s" if number is None else _MARKERS[number % len(_MARKERS)],
        label=label,
        **chosen,
    )


def _full_band(axes: "Axes", rows: Sequence[Row]) -> None:
    for row in rows:
        if row["method"] == FULL:
            axes.axhspan(*row["ci95"], color="#5b6670", alpha=0.15, lw=0)
            axes.axhline(row["accuracy"], color="#5b6670", ls="--", lw=1.2, label="full cache")


def _legend(axes: "Axes") -> None:
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False, fontsize=9)


def _number(value: float | None) -> float:
    return float("nan") if value is None else value


def _save(figure: "Figure", path: Path) -> None:
    _replace(path.with_suffix(".png"), lambda to: figure.savefig(to, format="png", dpi=200))
    _replace(
        path.with_suffix(".svg"),
        lambda to: figure.savefig(to, format="svg", metadata={"Date": None}),
    )


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    """Write in one piece."""
    temporary = path.with_name(f".{path.name}")
    write(temporary)
    temporary.replace(path)


_HEAD = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>purekv eval</title>
<style>
body { font: 15px/1.45 system-ui, sans-serif; max-width: 860px; margin: 1.5rem auto;
  padding: 0 1rem; color: #1c2126; background: #fff; }
img { width: 100%; } figure { margin: 1.2rem 0 2rem; } figcaption { color: #5b6670; }
table { border-collapse: collapse; font-size: .85rem; display: block; overflow-x: auto; }
th, td { padding: .25rem .7rem .25rem 0; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } th { color: #5b6670; font-weight: 500; }
tr + tr td { border-top: 1px solid #e3e7ea; }
</style>
<h1>Evaluation</h1>
"""


def _page(rows: Sequence[Row], drawn: Sequence[tuple[str, str]]) -> str:
    full = rows[0]
    parts = [
        _HEAD,
        f"<p>{full['samples']} samples, {full['n']} answers, about {full['tokens']} visual tokens "
        "a sample. Brackets and bars are 95% intervals.</p>\n",
    ]
    for name, title in drawn:
        parts.append(
            f'<figure><h2>{title}</h2><img src="{name}.svg" alt="{title}">'
            f'<figcaption><a href="{name}.png">PNG</a> <a href="{name}.svg">SVG</a></figcaption>'
            "</figure>\n"
        )
    parts.append(_table(rows))
    parts.append('<p><a href="results.json">results.json</a></p></html>\n')
    return "".join(parts)


def _table(rows: Sequence[Row]) -> str:
    columns: dict[str, Callable[[Row], str]] = {
        "method": row_name,
        "budget": lambda row: _budget(row),
        "n": lambda row: str(row["n"]),
        "accuracy": lambda row: _interval(row["accuracy"], row["ci95"]),
        "retention": lambda row: _interval(row["retention"], row["retention_ci95"]),
        "KL": lambda row: f"{row['kl']:.3g}",
        "KV, MiB": lambda row: f"{row['kv_bytes'] / _MIB:.1f}",
    }
    if "prefill_s" in rows[0]:
        columns["prefill, s"] = lambda row: f"{row['prefill_s']:.2f}"
        columns["decode, tokens/s"] = lambda row: f"{row['decode_tok_s']:.1f}"
    lines = ["".join(f"<th>{name}</th>" for name in columns)]
    for row in rows:
        lines.append("".join(f"<td>{html.escape(cell(row))}</td>" for cell in columns.values()))
    return "<table>" + "".join(f"<tr>{line}</tr>\n" for line in lines) + "</table>\n"


def _interval(value: float | None, bounds: Sequence[float] | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" + (f" [{bounds[0]:.2f}, {bounds[1]:.2f}]" if bounds else "")
