"""The stock language model's arithmetic with a low-rank update on every projection.

The update is added to the weights once a step (`effective`), so a layer is plain matrix products.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from tower import rms_norm, rotate

WIDTH, HEADS, KV_HEADS, HEAD, INNER = 576, 9, 3, 64, 1536
SECTIONS, THETA, EPS = (8, 12, 12), 100_000.0, 1e-5
PROJECTIONS = {  # name: (rows, columns)
    "self_attn.q_proj": (WIDTH, WIDTH),
    "self_attn.k_proj": (KV_HEADS * HEAD, WIDTH),
    "self_attn.v_proj": (KV_HEADS * HEAD, WIDTH),
    "self_attn.o_proj": (WIDTH, WIDTH),
    "mlp.gate_proj": (INNER, WIDTH),
    "mlp.up_proj": (INNER, WIDTH),
    "mlp.down_proj": (WIDTH, INNER),
}


def init_lora(generator: torch.Generator, layers: int, rank: int) -> dict[str, Tensor]:
    """Stacked over layers: `<projection>.a` [L, rank, in], `<projection>.b` [L, out, rank]."""
    lora = {}
    for name, (rows, columns) in PROJECTIONS.items():
        lora[f"{name}.a"] = torch.randn(layers, rank, columns, generator=generator) * columns**-0.5
        lora[f"{name}.b"] = torch.zeros(layers, rows, rank)
    return lora


def stack_base(
    weights: dict[str, Tensor], layers: int, device: torch.device, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Frozen weights of the first so many layers, stacked."""
    base = {
        name: torch.stack([weights[f"layers.{i}.{name}.weight"] for i in range(layers)]).to(
            device, dtype
        )
        for name in (*PROJECTIONS, "input_layernorm", "post_attention_layernorm")
    }
    base["embed"] = weights["embed_tokens.weight"].to(device, dtype)
    base["norm"] = weights["norm.weight"].to(device, dtype)
    return base


def effective(base: dict[str, Tensor], lora: dict[str, Tensor]) -> list[tuple[Tensor, ...]]:
    """Each layer's (norm, norm, qkv, o, gate and up, down)."""

    def merged(name: str) -> Tensor:
        weight = base[name]
        return weight + torch.bmm(
            lora[f"{name}.b"].to(weight.dtype), lora[f"{name}.a"].to(weight.dtype)
        )

    qkv = torch.cat([merged(f"self_attn.{p}_proj") for p in "qkv"], 1)
    wide = torch.cat([merged("mlp.gate_proj"), merged("mlp.up_proj")], 1)
    stacks = (
        base["input_layernorm"], base["post_attention_layernorm"], qkv,
        merged("self_attn.o_proj"), wide, merged("mlp.down_proj"),
    )  # fmt: skip
    return list(zip(*(stack.unbind(0) for stack in stacks), strict=True))


def rope_tables(
    prefix: int, patches: int, grid: int, count: int, between: int, tail: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """cos and sin [S, 64], as the stock model places text, `count` videos (or images), text.

    `between`: tokens of text between two videos. What follows a video goes on behind its rows and
    columns, however many patches it has.
    """
    t, h, w = (torch.arange(n, device=device) for n in (patches, grid, grid))
    video = torch.stack(torch.meshgrid(t, h, w, indexing="ij")).flatten(1)
    parts, at = [], 0
    for k in range(count):
        text = between if k else prefix
        parts.append(torch.arange(text, device=device).expand(3, -1) + at)
        parts.append(video + at + text)
        at += text + grid
    parts.append(torch.arange(tail, device=device).expand(3, -1) + at)
    where = torch.cat(parts, 1).float()
    step = THETA ** -(torch.arange(0, HEAD, 2, device=device).float() / HEAD)
    angle = where[:, :, None] * step
    angle = torch.cat([part[i] for i, part in enumerate(angle.split(SECTIONS, -1))], -1)
    angle = torch.cat([angle, angle], -1)
    return angle.cos(), angle.sin()


def layer(
    x: Tensor, cos: Tensor, sin: Tensor, n1: Tensor, n2: Tensor, wqkv: Tensor, wo: Tensor,
    wide: Tensor, wd: Tensor,
) -> Tensor:  # fmt: skip
    """x [B, S, 576]; padding is on the right, so a plain causal mask serves."""
    batch, length, _ = x.shape
    qkv = F.linear(rms_norm(x, n1, EPS), wqkv).view(batch, length, HEADS + 2 * KV_HEADS, HEAD)
    q, k, v = qkv.split((HEADS, KV_HEADS, KV_HEADS), 2)
    q, k = rotate(q, cos, sin).transpose(1, 2), rotate(k, cos, sin).transpose(1, 2)
    y = F.scaled_dot_product_attention(q, k, v.transpose(1, 2), is_causal=True, enable_gqa=True)
    x = x + F.linear(y.transpose(1, 2).reshape(batch, length, WIDTH), wo)
    gate, up = F.linear(rms_norm(x, n2, EPS), wide).chunk(2, -1)
    return x + F.linear(F.silu(gate) * up, wd)


def language(
    layers: list[tuple[Tensor, ...]], norm: Tensor, x: Tensor, cos: Tensor, sin: Tensor, layer=layer
) -> Tensor:
    """Embeddings [B, S, 576] -> normed hidden states; `layer` may be a compiled one."""
    for weights in layers:
        x = layer(x, cos, sin, *weights)
    return rms_norm(x, norm, EPS)


def answer_logits(hidden: Tensor, where: Tensor, embed: Tensor) -> Tensor:
    """Logits, fp32 [n, vocabulary], at flat places `where` of hidden [B, L, 576]."""
    return F.linear(hidden.flatten(0, 1)[where], embed).float()


def random_base(generator: torch.Generator, layers: int) -> dict[str, Tensor]:
    """Stand-in weights, for timing and tests."""
    weights = {}
    for i in range(layers):
        for name, (rows, columns) in PROJECTIONS.items():
            weights[f"layers.{i}.{name}.weight"] = (
                torch.randn(rows, columns, generator=generator) * 0.02
            )
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"layers.{i}.{name}.weight"] = torch.ones(WIDTH)
    weights["embed_tokens.weight"] = torch.randn(49152, WIDTH, generator=generator) * 0.1
    weights["norm.weight"] = torch.ones(WIDTH)
    return weights
