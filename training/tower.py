"""The stock vision tower's arithmetic on stock weights, batched over equal frames.

The stock forward loops over frames; this one sees `[frames, patches, width]` and so keeps a GPU
busy. tests/reference/test_training.py holds the two against each other.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

WIDTH, HEADS, INNER, OUT = 256, 4, 768, 576
PATCH, MERGE = 14, 2
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
_BLOCK = (
    "norm1.weight", "norm2.weight", "attn.qkv.weight", "attn.qkv.bias", "attn.proj.weight",
    "attn.proj.bias", "mlp.gate_proj.weight", "mlp.gate_proj.bias", "mlp.up_proj.weight",
    "mlp.up_proj.bias", "mlp.down_proj.weight", "mlp.down_proj.bias",
)  # fmt: skip


def init_tower(generator: torch.Generator, depth: int) -> dict[str, Tensor]:
    """Fresh float32 weights under the stock names."""

    def normal(*shape: int, gain: float = 1.0) -> Tensor:
        fan_in = shape[1] if len(shape) == 2 else 3 * 2 * PATCH * PATCH
        return torch.randn(shape, generator=generator) * (gain * fan_in**-0.5)

    weights = {"patch_embed.proj.weight": normal(WIDTH, 3, 2, PATCH, PATCH)}
    for i in range(depth):
        shapes = {
            "attn.qkv": (3 * WIDTH, WIDTH, 1.0), "attn.proj": (WIDTH, WIDTH, 0.3),
            "mlp.gate_proj": (INNER, WIDTH, 1.0), "mlp.up_proj": (INNER, WIDTH, 1.0),
            "mlp.down_proj": (WIDTH, INNER, 0.3),
        }  # fmt: skip
        for name, (rows, columns, gain) in shapes.items():
            weights[f"blocks.{i}.{name}.weight"] = normal(rows, columns, gain=gain)
            weights[f"blocks.{i}.{name}.bias"] = torch.zeros(rows)
        for name in ("norm1", "norm2"):
            weights[f"blocks.{i}.{name}.weight"] = torch.ones(WIDTH)
    merged = WIDTH * MERGE**2
    weights["merger.ln_q.weight"] = torch.ones(WIDTH)
    weights["merger.mlp.0.weight"], weights["merger.mlp.0.bias"] = (
        normal(merged, merged),
        torch.zeros(merged),
    )
    # The language model's embeddings have a root mean square near 0.1: start there.
    weights["merger.mlp.2.weight"], weights["merger.mlp.2.bias"] = (
        normal(OUT, merged, gain=0.2),
        torch.zeros(OUT),
    )
    return weights


def patchify(image: Tensor, noise: Tensor | None = None) -> Tensor:
    """uint8 [B, F, P, P, 3] -> [B * T, n, 3 * 2 * 14 * 14] as the processor does it.

    `noise` (a scalar: standard deviation in grey levels) adds what a video codec does to pixels:
    colour at half resolution and a little grain.
    """
    batch, frames, size, _, _ = image.shape
    x = image.float()
    if noise is not None:
        luma = (x * x.new_tensor([0.299, 0.587, 0.114])).sum(-1, keepdim=True)
        half = (
            (x - luma).view(batch, frames, size // 2, 2, size // 2, 2, 3).mean((3, 5), keepdim=True)
        )
        chroma = half.expand(-1, -1, -1, 2, -1, 2, -1).reshape(x.shape)
        x = luma + chroma + torch.randn_like(luma) * noise
        x = x.clamp(0, 255)
    x = (x / 255 - x.new_tensor(MEAN)) / x.new_tensor(STD)
    if frames == 1:
        x = x.expand(-1, 2, -1, -1, -1)
        frames = 2
    grid = size // (PATCH * MERGE)
    x = x.view(batch, frames // 2, 2, grid, MERGE, PATCH, grid, MERGE, PATCH, 3)
    x = x.permute(0, 1, 3, 6, 4, 7, 9, 2, 5, 8)
    return x.reshape(batch * (frames // 2), grid * grid * MERGE**2, 3 * 2 * PATCH * PATCH)


def rope_tables(grid: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin [n, head width] for a square frame, in the order of `patchify`."""
    line = torch.arange(grid * MERGE, device=device)
    rows, columns = torch.meshgrid(line, line, indexing="ij")
    where = torch.stack([rows, columns], -1).view(grid, MERGE, grid, MERGE, 2)
    where = where.transpose(1, 2).reshape(-1, 2).float()
    spatial = WIDTH // HEADS // 2
    step = 10000.0 ** -(torch.arange(0, spatial, 2, device=device).float() / spatial)
    angle = (where[:, :, None] * step).flatten(1)
    angle = torch.cat([angle, angle], -1)
    return angle.cos(), angle.sin()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    y = x.float()
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    return y.to(x.dtype) * weight


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [..., n, heads, d], tables [n, d]."""
    one, two = x.chunk(2, -1)
    turned = torch.cat([-two, one], -1)
    return (x.float() * cos[:, None] + turned.float() * sin[:, None]).to(x.dtype)


def block(
    x: Tensor, cos: Tensor, sin: Tensor, n1: Tensor, n2: Tensor, wqkv: Tensor, bqkv: Tensor,
    wo: Tensor, bo: Tensor, wg: Tensor, bg: Tensor, wu: Tensor, bu: Tensor, wd: Tensor, bd: Tensor,
) -> Tensor:  # fmt: skip
    frames, n, _ = x.shape
    qkv = F.linear(rms_norm(x, n1, 1e-6), wqkv, bqkv).view(frames, n, 3, HEADS, WIDTH // HEADS)
    q, k, v = qkv.unbind(2)
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    y = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    x = x + F.linear(y.transpose(1, 2).reshape(frames, n, WIDTH), wo, bo)
    y = rms_norm(x, n2, 1e-6)
    return x + F.linear(F.silu(F.linear(y, wg, bg)) * F.linear(y, wu, bu), wd, bd)


def any_size(x: Tensor, *dims: int) -> Tensor:
    """Tells torch.compile that these dimensions vary, so that it compiles once."""
    for dim in dims:
        torch._dynamo.maybe_mark_dynamic(x, dim)
    return x


def tower_depth(weights: dict[str, Tensor]) -> int:
    return sum(name.endswith("norm1.weight") for name in weights)


def tower(
    weights: dict[str, Tensor], patches: Tensor, cos: Tensor, sin: Tensor, block=block
) -> Tensor:
    """[B * T, n, 1176] -> [B * T, n / 4, 576]; `block` may be a compiled one."""
    x = any_size(F.linear(patches, weights["patch_embed.proj.weight"].flatten(1)), 0, 1)
    cos, sin = any_size(cos, 0), any_size(sin, 0)
    for i in range(tower_depth(weights)):
        x = block(x, cos, sin, *(weights[f"blocks.{i}.{name}"] for name in _BLOCK))
    x = rms_norm(x, weights["merger.ln_q.weight"], 1e-6)
    x = x.view(len(x), -1, WIDTH * MERGE**2)
    x = F.gelu(F.linear(x, weights["merger.mlp.0.weight"], weights["merger.mlp.0.bias"]))
    return F.linear(x, weights["merger.mlp.2.weight"], weights["merger.mlp.2.bias"])
