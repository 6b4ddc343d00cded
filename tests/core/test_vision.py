"""The vision tower's batched chunks: what transformers gets chunk by chunk, in fewer calls."""

from itertools import groupby

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from purekv import PureKV, PureKVConfig
from purekv.attention.vision import BatchedChunks, Chunks
from tests.core.prompts import MODALITIES, prompt
from tests.tiny import tiny_model

GRIDS = {
    "a video": [[4, 8, 8]],
    "odd sides": [[3, 10, 6]],
    "images and videos": [[1, 8, 8], [1, 10, 6], [2, 6, 12], [1, 2, 2]],
}


@given(st.lists(st.integers(1, 5), min_size=1, max_size=12), st.booleans(), st.integers(0, 2**31))
@settings(max_examples=100, deadline=None)
def test_each_chunk_attends_to_itself(lengths, sort, seed):
    generator = torch.Generator().manual_seed(seed)
    query, key, value = torch.randn(3, 1, 2, sum(lengths), 4, generator=generator)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    chunks = Chunks.of(cu_seqlens, sort)
    runs = sum(1 for _ in groupby(lengths))
    assert len(chunks.groups) == (len(set(lengths)) if sort else runs)
    parts = zip(*(x.split(lengths, 2) for x in (query, key, value)), strict=True)
    expected = torch.cat([F.scaled_dot_product_attention(*part, scale=0.4) for part in parts], 2)
    output = chunks.attend(query, key, value, 0.4, 0.0)
    torch.testing.assert_close(output, expected.transpose(1, 2), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_the_tower_gives_the_same_in_fewer_calls(monkeypatch, grid, dtype):
    tower = tiny_model().model.visual.to(dtype)
    grid_thw = torch.tensor(grid)
    pixels = torch.randn(int(grid_thw.prod(-1).sum()), 3 * 2 * 8 * 8, dtype=dtype)
    calls = []
    sdpa = F.scaled_dot_product_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or sdpa(*a, **k)
    )
    reads = []
    read = Chunks.of
    monkeypatch.setattr(
        Chunks, "of", lambda *args, **kwargs: reads.append(1) or read(*args, **kwargs)
    )
    with torch.no_grad():
        stock = tower(pixels, grid_thw=grid_thw)
        one_by_one = len(calls)
        with BatchedChunks(tower):
            ours = tower(pixels, grid_thw=grid_thw)
    assert torch.equal(ours.pooler_output, stock.pooler_output)
    assert len(calls) - one_by_one < one_by_one
    assert len(reads) == 2  # windows and frames, whatever the number of layers


@pytest.mark.parametrize("modality", MODALITIES)
def test_a_run_encodes_like_the_bare_model_and_restores_it(modality):
    model = tiny_model()
    tower = model.model.visual
    inputs = prompt(modality, 3)
    seen = []
    handle = tower.register_forward_hook(lambda _, args, output: seen.append(output.pooler_output))
    names = sorted(ALL_ATTENTION_FUNCTIONS.valid_keys())
    with torch.no_grad():
        model(**inputs)
        before = list(seen)
        with PureKV(PureKVConfig(budget=0.3))(model):
            assert tower.config._attn_implementation != "sdpa"
            model(**inputs)
    handle.remove()
    assert tower.config._attn_implementation == "sdpa"
    assert sorted(ALL_ATTENTION_FUNCTIONS.valid_keys()) == names
    for ours, theirs in zip(seen[len(before) :], before, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("attention", ["eager", "flash_attention_2"])
def test_other_towers_are_left_alone(attention):
    tower = tiny_model().model.visual
    tower.config._attn_implementation = attention
    with BatchedChunks(tower):
        assert tower.config._attn_implementation == attention
    assert tower.config._attn_implementation == attention


@pytest.mark.gpu
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_the_tower_gives_the_same_on_cuda(grid):
    tower = tiny_model().model.visual.to("cuda")
    grid_thw = torch.tensor(grid, device="cuda")
    pixels = torch.randn(int(grid_thw.prod(-1).sum()), 3 * 2 * 8 * 8, device="cuda")
    with torch.no_grad():
        stock = tower(pixels, grid_thw=grid_thw).pooler_output
        with BatchedChunks(tower):
            ours = tower(pixels, grid_thw=grid_thw).pooler_output
    torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-5)
