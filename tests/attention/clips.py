"""Random tensors of one clip, and what the kernel answers for them, in PyTorch."""

from typing import Any

import torch

from purekv.attention.partial import Partial, attend
from purekv.attention.temporal import add_earlier_frames

# B, Hkv, groups, T, h, w, head_dim, context, tile
SHAPES = [
    (1, 2, 3, 5, 4, 4, 16, 7, 2),
    (2, 1, 1, 3, 3, 5, 24, 0, 2),
    (1, 1, 7, 12, 2, 2, 16, 33, 2),
    (1, 2, 2, 6, 5, 4, 32, 16, 3),
    (1, 1, 4, 1, 3, 3, 16, 5, 1),
]


def clip_tensors(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> dict[str, Any]:
    batch, num_kv_heads, groups, frames, height, width, head_dim, context, tile = shape
    torch.manual_seed(0)

    def states(heads: int) -> torch.Tensor:
        x = torch.randn(batch, frames, height, width, heads, head_dim, device=device)
        return x.permute(0, 4, 1, 2, 3, 5).to(dtype)

    heads = num_kv_heads * groups
    query, key, value, out = (states(n) for n in (heads, num_kv_heads, num_kv_heads, heads))
    open_states = torch.randn(2, batch, num_kv_heads, context, head_dim, device=device).to(dtype)
    return {
        "found": Partial(states(heads), states(heads)[..., 0].float()),
        "query": query,
        "key": key,
        "value": value,
        "open_key": open_states[0],
        "open_value": open_states[1],
        # Half of the open positions come before the first frame, the others in between.
        "seen": tuple(context - context // 2 * (frames - 1 - n) // frames for n in range(frames)),
        "scaling": 0.3,
        "tile": tile,
        "out": out.fill_(torch.nan),
    }


def in_pytorch(
    found: Partial,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    open_key: torch.Tensor,
    open_value: torch.Tensor,
    seen: tuple[int, ...],
    scaling: float,
    tile: int,
    out: torch.Tensor,
) -> torch.Tensor:
    """Takes the kernel's arguments and leaves `out` alone."""
    result = found.widened()
    for frame, count in enumerate(seen):
        if count:
            keys, values = open_key[:, :, :count], open_value[:, :, :count]
            part = attend(query[:, :, frame].flatten(2, 3), keys, values, scaling)
            mine = Partial(result.out[:, :, frame], result.lse[:, :, frame])
            mine.add(part.unflatten(2, tuple(query.shape[3:5])))
    add_earlier_frames(result, query, key, value, scaling, tile)
    return result.out
