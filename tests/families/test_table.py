"""docs/families.md and `purekv families` say what the code and the tests do."""

import inspect
import json
from pathlib import Path

import pytest
import transformers

from purekv import families
from purekv.cli import main
from purekv.families import FAMILIES, GENERIC
from purekv.families.table import rows, with_table
from tests.families.zoo import SHOWS, TEXT, ZOO

PAGE = Path(__file__).parents[2] / "docs" / "families.md"


def test_the_page_is_up_to_date():
    page = PAGE.read_text()
    assert with_table(page) == page, "run: python -m purekv.families.table docs/families.md"


@pytest.mark.parametrize("name", [name for name in FAMILIES if FAMILIES[name].native])
def test_what_a_family_claims_is_in_the_matrix(name):
    zoo = {**ZOO, **TEXT}[name]  # a family without a tiny model fails here
    shows = [
        s for s, items in SHOWS.items() if s not in zoo.without and set(items) <= set(zoo.items)
    ]
    if name in ZOO:
        claim = f"tiny random models: {', '.join(shows)}; sdpa, eager"
    else:
        claim = "tiny random models: text; sdpa"
    assert FAMILIES[name].tested_on[0] == claim
    assert set(zoo.items) == set(FAMILIES[name].modalities) - {"text"}


@pytest.mark.parametrize("family", dict.fromkeys(FAMILIES.values()), ids=lambda one: one.name)
def test_a_family_is_one_small_file_and_one_line(family):
    """VideoLLaMA2's brings its model along, in other files."""
    name = type(family).__name__
    assert len(inspect.getsource(inspect.getmodule(type(family))).splitlines()) < 120
    registry = inspect.getsource(families)
    assert registry.count(f"    {name}(),\n") == 1
    assert registry.count(f" import {name}\n") == 1


def test_the_verb_lists_them(capsys):
    with pytest.raises(SystemExit) as end:
        main(["families", "--json"])
    assert end.value.code == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["transformers"] == transformers.__version__
    assert answer["families"] == rows()
    assert [row["family"] for row in answer["families"]][-1] == GENERIC.name
    with pytest.raises(SystemExit):
        main(["families"])
    text = capsys.readouterr().out
    for row in rows():
        assert row["family"] in text


def test_what_transformers_lacks_is_said(capsys, monkeypatch):
    monkeypatch.setattr(FAMILIES["gemma3"], "model_types", ("gemma3000",), raising=False)
    with pytest.raises(SystemExit):
        main(["families"])
    version = transformers.__version__
    assert f"Gemma 3 (absent from transformers {version})" in capsys.readouterr().out
