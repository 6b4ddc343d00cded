"""Context and temporal pass of a clip in one Triton kernel; `temporal.py` is the same in PyTorch.

A program holds a block of queries of one tile and one KV head: the tile's positions in some
neighbouring frames, each times the query heads that share the KV head, so that tensor cores get
full blocks although a tile has few positions in a frame. It starts from the attention within frames
(output and log-sum-exp), goes over the open positions before the clip, then over the tile's own
keys in earlier frames, where they lie among all others, and writes the sum of all three in the
model's dtype.

Rows of a tile are numbered by frame, then place in the tile, then query head; its keys by frame,
then place.
"""

from contextlib import nullcontext
from functools import cache, lru_cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from purekv.attention.partial import Partial
from purekv.attention.temporal import regions

LOG2_E = 1.4426950408889634


def usable(query: Tensor) -> bool:
    """Whether the kernel takes such queries [..., D]; what it does not take, PyTorch does."""
    half = query.dtype in (torch.float16, torch.bfloat16)
    return query.is_cuda and half and query.shape[-1] <= 256 and _runs_on(query.device)


@cache
def _runs_on(device: torch.device) -> bool:
    """Tensor cores for bfloat16 and asynchronous copies came with Ampere."""
    return find_spec("triton") is not None and torch.cuda.get_device_capability(device) >= (8, 0)


def add_context_and_earlier_frames(
    found: Partial,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    open_key: Tensor,
    open_value: Tensor,
    seen: tuple[int, ...],
    scaling: float,
    tile: int,
    out: Tensor,
) -> None:
    """Write to `out` what `found` and the other two passes add up to.

    Any strides will do, but for the last dimension.

    Args:
        found: out [B, H, T, h, w, D] and lse [B, H, T, h, w] over the own frame.
        query: [B, H, T, h, w, D].
        key, value: [B, Hkv, T, h, w, D].
        open_key, open_value: [B, Hkv, n, D], the context.
        seen: how many of those, from the first one on, each frame sees; T counts that never fall.
        scaling: factor on the dot products.
        tile: side of a tile; those at the right and lower edges may be smaller.
        out: [B, H, T, h, w, D], in any dtype.
    """
    import triton  # only where it is used: purekv works without

    from purekv.attention.triton_temporal_kernel import tuned

    counts = _on(seen, query.device)
    batch, num_kv_heads, frames, _, _, head_dim = key.shape
    groups = query.shape[1] // num_kv_heads
    for rows, tile_height in regions(query.shape[3], tile):
        for columns, tile_width in regions(query.shape[4], tile):
            where = (slice(None), slice(None), slice(None), rows, columns)
            tensors = [x[where] for x in (query, key, value, found.out, found.lse, out)]
            down, across = tensors[0].shape[3] // tile_height, tensors[0].shape[4] // tile_width
            num_rows = frames * tile_height * tile_width * groups
            programs = down * across, batch * num_kv_heads

            def grid(
                meta: Any, num_rows: int = num_rows, programs: tuple[int, int] = programs
            ) -> tuple[int, ...]:
                return triton.cdiv(num_rows, meta["BLOCK_M"]), *programs

            with torch.cuda.device(query.device) if query.is_cuda else nullcontext():
                tuned[grid](
                    *tensors,
                    open_key,
                    open_value,
                    counts,
                    *(x.stride()[:5] for x in tensors),
                    open_key.stride()[:3],
                    open_value.stride()[:3],
                    frames,
                    across,
                    num_kv_heads,
                    tile,
                    scaling * LOG2_E,
                    GROUPS=groups,
                    TILE_HEIGHT=tile_height,
                    TILE_WIDTH=tile_width,
                    HEAD_DIM=head_dim,
                    BLOCK_D=max(16, triton.next_power_of_2(head_dim)),
                )


@lru_cache(maxsize=64)
def _on(counts: tuple[int, ...], device: torch.device) -> Tensor:
    """Kept for all layers of a prompt: moving them makes the host wait."""
    return torch.tensor(counts, dtype=torch.int32, device=device)
