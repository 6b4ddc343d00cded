"""Arithmetic of the hole, and the bookkeeping of blocks, for prompts of all lengths."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from purekv.errors import PureKVError
from purekv.serving.hole import Room
from purekv.serving.settings import ServingConfig
from purekv.serving.versions import check_version

rooms = st.builds(
    Room,
    budget=st.one_of(st.floats(0.01, 0.99), st.integers(2, 3000)),
    least=st.integers(0, 80),
    min_tokens=st.integers(0, 300),
)


@given(rooms, st.integers(1, 5000), st.sampled_from([1, 7, 16, 32, 128]))
def test_kept_entries_take_the_slots_their_blocks_have(room, tokens, block_size):
    hole = room.hole(tokens, block_size)
    if hole is None:
        return
    assert tokens >= room.min_tokens
    assert hole.kept >= max(room.least, block_size)
    positions = hole.positions()
    assert len(positions) == hole.kept == len(set(positions))
    assert positions == sorted(positions)
    blocks = {position // block_size for position in positions}
    assert 0 in blocks
    assert not blocks & set(range(hole.first, hole.stop))
    # Dropping the hole from the block table makes the entries contiguous, the next token included.
    for entry, position in enumerate([*positions, tokens]):
        block, place = divmod(position, block_size)
        packed = block - hole.blocks * (block >= hole.stop)
        assert packed * block_size + place == entry


@given(rooms, st.integers(1, 5000), st.sampled_from([1, 16, 32]))
def test_the_budget_is_reached_where_blocks_and_protection_allow(room, tokens, block_size):
    hole = room.hole(tokens, block_size)
    if hole is None:
        return
    asked = room.budget * tokens if isinstance(room.budget, float) else room.budget
    assert hole.kept <= max(asked + 1e-6, max(room.least, block_size) + block_size - 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"budget": 1}, "budget=1;"),
        ({"budget": 1.0}, "budget=1.0;"),
        ({"scorer": "h2o"}, "scorers here are clie"),
        ({"window": 0}, "window=0;"),
        ({"sources": 3}, "unknown setting 'sources'"),
        ({"source_layers": [3, 1]}, "ascending"),
    ],
)
def test_settings_are_refused_with_the_fix(settings, message):
    with pytest.raises(PureKVError, match=message):
        ServingConfig.from_dict(settings)


def test_settings_survive_json():
    settings = ServingConfig(budget=0.1, source_layers=(1, 3))
    assert ServingConfig.among({"purekv": settings.to_dict()}) == settings
    assert ServingConfig.among({}) is None


@pytest.mark.parametrize("version", ["0.28.1", "0.33.0", "1.0.0", "dev"])
def test_untested_versions_are_refused(version):
    with pytest.raises(PureKVError, match=r"0\.29 to 0\.32"):
        check_version(version)


@pytest.mark.parametrize("version", ["0.29.0", "0.32.0", "0.32.1+cpu"])
def test_tested_versions_pass(version):
    check_version(version)
