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
    seen = torch.randn(2, batch, num_kv_heads, context, head_dim, device=device).to(dtype)
    return {
        "found": Partial(states(heads), states(heads)[..., 0].float()),
        "query": query,
        "key": key,
        "value": value,
        "context": (seen[0], seen[1]) if context else None,
        "scaling": 0.3,
        "tile": tile,
        "out": out.fill_(torch.nan),
    }


def in_pytorch(
    found: Partial,
    query: Any,
    key: Any,
    value: Any,
    context: Any,
    scaling: float,
    tile: int,
    out: Any,
) -> torch.Tensor:
    result = found.widened()
    if context is not None:
        seen = attend(query.flatten(2, 4), *context, scaling)
        result.add(seen.unflatten(2, query.shape[2:5]))
    add_earlier_frames(result, query, key, value, scaling, tile)
    return result.out
