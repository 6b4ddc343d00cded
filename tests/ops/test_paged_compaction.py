"""Entries moved in place: the reference against loops, the kernel against the reference."""

import sys
from importlib.util import find_spec

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from purekv.ops.paged_compaction import paged_compaction, reference
from purekv.serving.hole import Hole
from tests.processes import run

LAYOUTS = ("tokens first", "heads first", "halves of a block", "halves of the cache")

# tokens, entries that stay, block size, KV heads, D
CASES = [(70, 38, 16, 2, 32), (64, 32, 16, 3, 80), (67, 3, 1, 1, 16), (500, 180, 32, 2, 16)]
CASES += [
    (356, 228, 128, 2, 16),
    (300, 204, 96, 1, 48),
    (33, 32, 1, 2, 16),
    (257, 1 + 128, 128, 2, 64),
]


def caches(layout, blocks, block_size, heads, head_dim, device, dtype):
    """Keys and values [blocks, block_size, heads, head_dim] as vLLM's backends have them."""
    generator = torch.Generator().manual_seed(0)

    def entries(*shape):
        return torch.randn(*shape, generator=generator).to(device, dtype)

    if layout == "tokens first":
        return entries(blocks, block_size, heads, 2 * head_dim).split(head_dim, -1)
    if layout == "heads first":
        both = entries(blocks, heads, block_size, 2 * head_dim).transpose(1, 2)
        return both.split(head_dim, -1)
    if layout == "halves of a block":
        return entries(blocks, 2, block_size, heads, head_dim).unbind(1)
    return entries(2, blocks, block_size, heads, head_dim).unbind(0)


def prompt(tokens, count, block_size, heads, device="cpu", seed=1):
    """A table of blocks in any order, and random positions that stay."""
    generator = torch.Generator().manual_seed(seed)
    needed = -(-tokens // block_size)
    table = torch.randperm(needed + 3, generator=generator)[:needed].to(device, torch.int32)
    order = [torch.randperm(tokens, generator=generator)[:count] for _ in range(heads)]
    return table, torch.stack(order).sort(-1).values.to(device), needed + 3


def check(case, layout, device, dtype, seed=1):
    """Every bit of both caches, whichever block it is in."""
    tokens, count, block_size, heads, head_dim = case
    table, kept, blocks = prompt(tokens, count, block_size, heads, device, seed)
    shape = blocks, block_size, heads, head_dim
    ours, expected = (caches(layout, *shape, device, dtype) for _ in range(2))
    paged_compaction(*ours, table, kept, tokens)
    reference(*expected, table, kept, tokens)
    for one, other in zip(ours, expected, strict=True):
        assert torch.equal(one, other)


def check_interpreted(case, layout):
    from purekv.ops.paged_compaction import kernel

    kernel.ENTRIES = 8  # so that small cases take several turns
    tokens, count, block_size, heads, head_dim = case
    table, kept, blocks = prompt(tokens, count, block_size, heads)
    shape = blocks, block_size, heads, head_dim
    ours, expected = (caches(layout, *shape, "cpu", torch.float32) for _ in range(2))
    kernel.paged_compaction(*ours, table, kept, tokens)
    reference(*expected, table, kept, tokens)
    assert all(torch.equal(*pair) for pair in zip(ours, expected, strict=True)), (case, layout)


@given(
    st.integers(2, 200),
    st.integers(0, 60),
    st.sampled_from([1, 7, 16, 32]),
    st.sampled_from(LAYOUTS),
)
def test_entries_go_where_the_hole_says(tokens, freed, block_size, layout):
    count = tokens - freed * block_size
    if not block_size <= count < tokens:
        return
    table, kept, blocks = prompt(tokens, count, block_size, heads=2)
    key, value = caches(layout, blocks, block_size, 2, 16, "cpu", torch.float32)
    before = key.clone(), value.clone()
    reference(key, value, table, kept, tokens)
    changed = torch.zeros(blocks, block_size, dtype=torch.bool)
    for entry, place in enumerate(Hole(tokens, count, block_size).positions()):
        block, inside = int(table[place // block_size]), place % block_size
        changed[block, inside] = True
        for head in range(2):
            position = int(kept[head, entry])
            source = int(table[position // block_size]), position % block_size, head
            assert torch.equal(key[block, inside, head], before[0][source])
            assert torch.equal(value[block, inside, head], before[1][source])
    assert torch.equal(key[~changed], before[0][~changed])
    assert torch.equal(value[~changed], before[1][~changed])


@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
def test_the_interpreted_kernel_equals_the_reference():
    code = (
        "from tests.ops.test_paged_compaction import CASES, LAYOUTS, check_interpreted\n"
        "for case in CASES:\n"
        "    for layout in LAYOUTS:\n"
        "        check_interpreted(case, layout)\n"
    )
    done = run([sys.executable, "-c", code], env={"TRITON_INTERPRET": "1"})
    assert done.returncode == 0, done.stderr


LARGE = [(32_768 + 5, 6549, 16, 4, 128), (9001, 8985, 16, 2, 128), (20_000, 32, 32, 8, 64)]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES + LARGE, ids=str)
def test_the_kernel_equals_the_reference(case, layout, dtype):
    for seed in range(5):
        check(case, layout, "cuda", dtype, seed)
