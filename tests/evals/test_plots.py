"""Pictures of an evaluation: all there, readable by others, and made of the rows alone."""

import builtins
import json
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from purekv import PureKVError
from purekv.evals import plots

NAMES = ("accuracy", "accuracy_prefill", "categories", "costs")


def part(accuracy: float, n: int = 40, full: float = 0.9) -> dict[str, Any]:
    retention = accuracy / full if full else None
    return {
        "n": n, "accuracy": accuracy, "ci95": [accuracy - 0.05, accuracy + 0.04],
        "retention": retention, "retention_ci95": retention and [retention, retention],
    }  # fmt: skip


def row(method: str, budget: float | int, accuracy: float, **more: Any) -> dict[str, Any]:
    categories = {"count": part(accuracy), "code": part(0.0, full=0.0)}
    return {
        "method": method, "prefill": "dense", "evict": "post", "budget": budget, "samples": 20,
        "tokens": 1000, "kl": 0.1, "kv_bytes": round(2**20 * accuracy * 7), "mcnemar_p": 0.5,
        "by_category": categories, **part(accuracy), **more,
    }  # fmt: skip


ROWS = [
    row("full", 1.0, 0.9, evict=None),
    row("clie", 0.2, 0.85),
    row("clie", 50, 0.8),
    row("snapkv", 0.2, 0.7),
    row("snapkv", 50, 0.6),
    row("snapkv", 0.2, 0.65, evict="active"),
]
TIMES = [{"prefill_s": 2 + k / 10, "decode_tok_s": 20.0 - k} for k in range(len(ROWS))]
TIMED = [row | times for row, times in zip(ROWS, TIMES, strict=True)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "results.json").write_text(json.dumps({"rows": ROWS}))
    (tmp_path / "timing.json").write_text(json.dumps(TIMES))
    return tmp_path


class _Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found |= {value or "" for name, value in attrs if name in ("src", "href")}


def test_files_and_page(folder: Path) -> None:
    page = plots.write_plots(folder)
    assert page == folder / "index.html"
    for name in NAMES:
        assert Image.open(folder / f"{name}.png").width == 1600
        assert ET.parse(folder / f"{name}.svg").getroot().tag.endswith("svg")
    links = _Links()
    links.feed(page.read_text())
    assert links.found == {f"{n}.{kind}" for n in NAMES for kind in ("png", "svg")} | {
        "results.json"
    }
    assert all((folder / link).exists() for link in links.found)
    assert "snapkv active" in page.read_text()
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]
    before = (folder / "costs.svg").read_bytes()
    plots.write_plots(folder)
    assert (folder / "costs.svg").read_bytes() == before


def test_without_timing_there_is_no_picture_of_it(folder: Path) -> None:
    (folder / "timing.json").unlink()
    plots.write_plots(folder)
    assert not (folder / "accuracy_prefill.png").exists()
    assert "accuracy_prefill" not in (folder / "index.html").read_text()
    assert len(plots.costs(ROWS).axes) == 1


def test_bars_are_the_rows() -> None:
    panels = plots.costs(TIMED).axes
    keys = {"kv_bytes": 2**20, "prefill_s": 1, "decode_tok_s": 1}
    assert len(panels) == len(keys)
    for axes, (key, unit) in zip(panels, keys.items(), strict=True):
        assert [bar.get_width() for bar in axes.patches] == [row[key] / unit for row in TIMED]
    labels = [label.get_text() for label in panels[0].get_yticklabels()]
    assert labels[:3] == ["full", "clie, 20%", "clie, 50 tokens"]
    assert labels[-1] == "snapkv active, 20%"


@pytest.mark.parametrize("draw", [plots.accuracy_by_budget, plots.accuracy_by_prefill])
def test_points_and_intervals_are_the_rows(draw) -> None:
    axes = draw(TIMED).axes[0]
    drawn, bounds = [], []
    for container in axes.containers:
        line, _, (bars,) = container.lines
        drawn += list(line.get_ydata())
        bounds += [tuple(segment[:, 1]) for segment in bars.get_segments() if len(segment)]
    rows = (
        TIMED if draw is plots.accuracy_by_prefill else TIMED[1:]
    )  # else the full cache is a band
    assert sorted(drawn) == sorted(row["accuracy"] for row in rows)
    assert sorted(bounds) == [
        pytest.approx(tuple(row["ci95"])) for row in sorted(rows, key=lambda row: row["ci95"])
    ]


def test_the_heat_map_is_the_rows_of_the_smallest_budget() -> None:
    axes = plots.retention_by_category(ROWS).axes[0]
    values = axes.images[0].get_array()
    assert [label.get_text() for label in axes.get_yticklabels()] == ["clie", "snapkv"]
    assert values[:, 0].tolist() == [ROWS[k]["by_category"]["count"]["retention"] for k in (2, 4)]
    assert values.mask[:, 1].all()  # nothing was right before either
    assert [text.get_text() for text in axes.texts] == ["0.89", "-", "0.67", "-"]


def test_only_the_full_cache(folder: Path) -> None:
    (folder / "results.json").write_text(json.dumps({"rows": ROWS[:1]}))
    (folder / "timing.json").unlink()
    plots.write_plots(folder)
    assert sorted(path.stem for path in folder.glob("*.svg")) == ["costs"]


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch) -> None:
    with pytest.raises(PureKVError, match=r"no results.json; run purekv eval"):
        plots.write_plots(tmp_path)
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "matplotlib":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(PureKVError, match=r"pip install purekv\[plots\]"):
        plots.require_matplotlib()
