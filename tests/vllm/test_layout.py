"""Entries are read where vLLM's kernels wrote them; kernels that write otherwise are refused."""

import pytest
import torch

from purekv.errors import PureKVError

pytestmark = pytest.mark.vllm


@pytest.fixture
def cpu():
    from purekv.serving import cpu

    return cpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("isa", "heads", "head_dim", "block_size"),
    [("vec", 2, 32, 32), ("vec", 3, 128, 96), ("vec16", 1, 80, 64), ("vec16", 2, 64, 32)],
)
def test_what_was_written_is_read(cpu, isa, heads, head_dim, block_size, dtype):
    from vllm import _custom_ops as ops

    torch.manual_seed(0)
    blocks = 7
    cache = torch.full((blocks, heads, block_size, 2 * head_dim), torch.nan, dtype=dtype)
    slots = torch.randperm(blocks * block_size)[: 2 * block_size + 5]
    key, value = torch.randn(2, len(slots), heads, head_dim).to(dtype)
    halves = cache.view(blocks, heads, 2 * block_size, head_dim).chunk(2, dim=2)
    ops.cpu_attn_reshape_and_cache(key, value, *halves, slots, isa)
    stored_key, stored_value = cpu.stored_states(cache, slots)
    assert torch.equal(stored_key, key)
    assert torch.equal(stored_value, value)


def test_the_layout_of_amx_is_refused_where_vllm_chooses_it(cpu, monkeypatch):
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    for dtype in (torch.float32, torch.float16):
        cpu.check_layout(_get_attn_isa(dtype, 32, 128), dtype)
    cpu.check_layout(_get_attn_isa(torch.bfloat16, 32, 80), torch.bfloat16)
    with pytest.raises(PureKVError, match="add --dtype float16 or --dtype float32"):
        cpu.check_layout(_get_attn_isa(torch.bfloat16, 32, 128), torch.bfloat16)


def test_layouts_that_were_not_tested_are_refused(cpu):
    with pytest.raises(PureKVError, match="neon"):
        cpu.check_layout("neon", torch.float32)
