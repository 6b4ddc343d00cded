"""The same in Triton, in place and without a copy.

Let N tokens become B entries, of which the first W fill whole blocks. Entry e was at position
kept[e] and goes to e in front (e < W), to e + N - B behind. As kept positions ascend,
e <= kept[e] <= e + N - B: in front entries move down, behind they move up. Hence

- in front, in ascending order, a write to e hits no position that is still to be read, as those are
  above e; behind, in descending order, likewise;
- the two parts do not meet: the front reads below W + N - B and writes below W, the rest reads from
  W on and writes from W + N - B on.

So each (head, part, slice of dimensions) is a program of its own. It takes its entries some at a
time: all of these are read before one of them is written.
"""

import torch
import triton  # type: ignore[import-not-found,import-untyped,unused-ignore]
import triton.language as tl  # type: ignore[import-not-found,import-untyped,unused-ignore]
from torch import Tensor

ENTRIES = 64  # at a time
DIMS = 32  # of a program


@triton.jit
def _address(table, position, block_size, block_stride, place_stride):  # type: ignore[no-untyped-def]
    block = tl.load(table + position // block_size).to(tl.int64)
    return block * block_stride + position % block_size * place_stride


@triton.jit(do_not_specialize=["tokens", "count"])
def _move(  # type: ignore[no-untyped-def]
    cache, table, kept, tokens, count, block_size,
    block_stride, place_stride, head_stride, kept_stride,
    HEAD_DIM: tl.constexpr, ENTRIES: tl.constexpr, DIMS: tl.constexpr,
):  # fmt: skip
    """One part of one head's entries, in some of its dimensions."""
    head = tl.program_id(0).to(tl.int64)
    behind = tl.program_id(1)
    dim = tl.program_id(2) * DIMS + tl.arange(0, DIMS)
    whole = count // block_size * block_size
    mine = tl.where(behind == 1, count - whole, whole)
    for done in range(0, mine, ENTRIES):
        order = done + tl.arange(0, ENTRIES)
        exists = order < mine
        entry = tl.where(exists, tl.where(behind == 1, count - 1 - order, order), 0)
        source = tl.load(kept + head * kept_stride + entry, mask=exists, other=0)
        target = tl.where(exists, entry + behind * (tokens - count), 0)
        read = _address(table, source, block_size, block_stride, place_stride)
        write = _address(table, target, block_size, block_stride, place_stride)
        states = cache + head * head_stride + dim[None, :]
        inside = exists[:, None] & (dim < HEAD_DIM)[None, :]
        moved = tl.load(states + read[:, None], mask=inside)
        tl.debug_barrier()  # other threads' entries may be overwritten from here on
        tl.store(states + write[:, None], moved, mask=inside)


def paged_compaction(
    key_cache: Tensor, value_cache: Tensor, table: Tensor, kept: Tensor, tokens: int
) -> None:
    """As the reference. Waits for nothing."""
    heads, count = kept.shape
    assert kept.stride(1) == 1
    assert table.stride(0) == 1
    with torch.cuda.device_of(key_cache):
        for cache in (key_cache, value_cache):
            assert cache.stride(3) == 1
            block_size, head_dim = cache.shape[1], cache.shape[3]
            _move[heads, 2, triton.cdiv(head_dim, DIMS)](
                cache, table, kept, tokens, count, block_size,
                cache.stride(0), cache.stride(1), cache.stride(2), kept.stride(0),
                HEAD_DIM=head_dim, ENTRIES=ENTRIES, DIMS=DIMS, num_warps=4, num_stages=1,
            )  # fmt: skip
