"""Tables of few samples: no interval is not a number, and nowhere a traceback."""

import json
import runpy
from pathlib import Path

import pytest

from purekv import PureKVConfig
from purekv.cli.tables import show_evaluation
from purekv.evals import Outcome, Record, Sample, Turn, accuracy_interval, summarise
from purekv.evals.summary import media_clusters

TABLES = Path(__file__).parents[2] / "benchmarks" / "tables.py"


def sample(number: int, *media: str) -> Sample:
    turns = (Turn("what?", "a cat", "open"), Turn("why?", "no", "open"))
    return Sample(str(number), (), tuple(map(Path, media)), turns)


def row_of(samples, right):
    outcomes = [Outcome(["", ""], list(one), [0.1, 0.1], [1.0, 1.0], 100) for one in right]
    records = {s.id: Record(s.id, 6, 1, (outcomes[0], outcomes[1])) for s in samples}
    return summarise(samples, records, [PureKVConfig(budget=0.5, first_token="compressed")])


@pytest.fixture
def few():
    return row_of([sample(k, f"{k}.png") for k in range(3)], [(True, True), (True, False)])


def test_few_samples_have_no_interval(few, capsys):
    assert [row["retention"] for row in few] == [1.0, 0.5]
    assert [row["retention_ci95"] for row in few] == [None, None]
    assert json.loads(json.dumps(few)) == few
    show_evaluation(few)
    assert "0.5" in capsys.readouterr().out


def test_tables_show_what_has_no_interval(few):
    tables = runpy.run_path(str(TABLES))
    assert "| 0.500 |" in tables["retention"](few)
    assert "| 0.000 |" in tables["later"](few)
    never = row_of([sample(0, "a.png")], [(False, False), (False, False)])
    assert "| - |" in tables["retention"](never)


def test_pictures_show_what_has_no_interval(few, tmp_path):
    from purekv.evals.plots import write_plots

    (tmp_path / "results.json").write_text(json.dumps({"rows": few}))
    assert "<td>0.500</td>" in write_plots(tmp_path).read_text()


def test_samples_that_share_an_image_are_one_cluster():
    media = [("a", "b"), ("c",), ("d", "e"), ("b", "c"), ("f",), ("e", "d"), ("f",)]
    names = media_clusters([sample(k, *paths) for k, paths in enumerate(media)])
    assert names == ["a|b", "a|b", "d|e", "a|b", "f", "d|e", "f"]
    videos = [Sample("0", (Path("a"),), (Path("b"),), ()), Sample("1", (), (Path("b"),), ())]
    assert media_clusters(videos) == ["a|b", "a|b"]
    assert media_clusters([]) == []


def test_long_chains_of_shared_images_are_one_cluster():
    chain = [sample(k, f"{k}", f"{k + 1}") for k in range(5000)]
    assert len(set(media_clusters(chain))) == len(set(media_clusters(chain[::-1]))) == 1


def test_answers_about_shared_images_are_clustered():
    samples = [sample(k, f"{k // 2}.png", f"own-{k}.png") for k in range(20)]
    one = {True: Outcome(["", ""], [True] * 2, [0.0] * 2, [1.0] * 2, 100),
           False: Outcome(["", ""], [False] * 2, [0.0] * 2, [1.0] * 2, 100)}  # fmt: skip
    records = {s.id: Record(s.id, 6, 1, (one[k // 2 % 2 == 0],)) for k, s in enumerate(samples)}
    (row,) = summarise(samples, records, [])
    rights = [k // 4 % 2 == 0 for k in range(40)]
    expected = accuracy_interval(rights, [str(k // 4) for k in range(40)])
    assert row["ci95"] == pytest.approx(expected)
