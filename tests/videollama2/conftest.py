"""Tiny checkpoints of the released format, each written and loaded once a module."""

import functools

import pytest

from purekv.families.videollama2 import load
from tests.videollama2 import checkpoints


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model by the name of its kind."""
    root = tmp_path_factory.mktemp("videollama2")
    return functools.cache(lambda name: load(checkpoints.write(root / name, name)))
