"""VideoLLaMA2 in plain float64 over a dictionary of upstream's tensors: no modules, no attention
functions, nothing of ours. Written from the description of the model, to compare with."""

import math

import numpy as np
import torch
from torch import Tensor

Weights = dict[str, Tensor]


def under(weights: Weights, prefix: str) -> Weights:
    return {
        name.removeprefix(prefix): value.double()
        for name, value in weights.items()
        if name.startswith(prefix)
    }


def linear(w: Weights, name: str, x: Tensor) -> Tensor:
    y = x @ w[f"{name}.weight"].T
    return y + w[f"{name}.bias"] if f"{name}.bias" in w else y


def norm(w: Weights, name: str, x: Tensor, eps: float) -> Tensor:
    """Over the last dimension."""
    x = x - x.mean(-1, keepdim=True)
    x = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    return x * w[f"{name}.weight"] + w[f"{name}.bias"]


def silu(x: Tensor) -> Tensor:
    return x / (1 + (-x).exp())


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / 2**0.5))


def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    """[..., S, D] each."""
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5 + bias
    return scores.softmax(-1) @ value


def heads(x: Tensor, count: int) -> Tensor:
    """[B, S, count * D] to [B, count, S, D]."""
    return x.reshape(*x.shape[:2], count, -1).transpose(1, 2)


def merged(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


# Vision: pre-norm transformers; `layers` of them.


def vision(w: Weights, pixels: Tensor, layers: int, num_heads: int, clip: bool) -> Tensor:
    """[N, 3, H, W] to [N, patches, hidden]."""
    kernel = w["embeddings.patch_embedding.weight"]
    size = kernel.shape[-1]
    patches = pixels.double().unfold(2, size, size).unfold(3, size, size)  # [N, 3, h, w, p, p]
    x = torch.einsum("nchwij,dcij->nhwd", patches, kernel).flatten(1, 2)
    x = x + w.get("embeddings.patch_embedding.bias", 0.0)
    if clip:
        x = torch.cat([w["embeddings.class_embedding"].expand(len(x), 1, -1), x], dim=1)
    x = x + w["embeddings.position_embedding.weight"]
    eps = 1e-5 if clip else 1e-6
    if clip:
        x = norm(w, "pre_layrnorm", x, eps)
    for number in range(layers):
        layer = f"encoder.layers.{number}"
        y = norm(w, f"{layer}.layer_norm1", x, eps)
        q, k, v = (
            heads(linear(w, f"{layer}.self_attn.{n}_proj", y), num_heads) for n in ("q", "k", "v")
        )
        x = x + linear(w, f"{layer}.self_attn.out_proj", merged(attend(q, k, v)))
        y = linear(w, f"{layer}.mlp.fc1", norm(w, f"{layer}.layer_norm2", x, eps))
        if clip:
            y = y * torch.sigmoid(1.702 * y)
        else:
            y = 0.5 * y * (1 + torch.tanh((2 / math.pi) ** 0.5 * (y + 0.044715 * y**3)))
        x = x + linear(w, f"{layer}.mlp.fc2", y)
    return x[:, int(clip) :]


# The connector, channels last.


def conv_norm(w: Weights, name: str, x: Tensor) -> Tensor:
    """[N, h, w, C]; 1x1, or depthwise 3x3."""
    kernel = w[f"{name}.conv.weight"]
    if kernel.shape[-1] == 1:
        y = x @ kernel[:, :, 0, 0].T
    else:
        _, height, width, _ = x.shape
        padded = torch.nn.functional.pad(x, (0, 0, 1, 1, 1, 1))
        y = torch.zeros_like(x)
        for row in range(3):
            for column in range(3):
                part = padded[:, row : row + height, column : column + width]
                y = y + part * kernel[:, 0, row, column]
    return norm(w, f"{name}.bn", y, 1e-5)


def stage(w: Weights, x: Tensor) -> Tensor:
    for number in range(1, 5):
        b = f"b{number}"
        y = silu(conv_norm(w, f"{b}.conv1", x))
        y = silu(conv_norm(w, f"{b}.conv2", y))
        pooled = y.mean((1, 2))
        fc1, fc2 = w[f"{b}.se.fc1.weight"][..., 0, 0], w[f"{b}.se.fc2.weight"][..., 0, 0]
        squeezed = silu(pooled @ fc1.T + w[f"{b}.se.fc1.bias"])
        gate = torch.sigmoid(squeezed @ fc2.T + w[f"{b}.se.fc2.bias"])
        y = conv_norm(w, f"{b}.conv3", y * gate[:, None, None])
        shortcut = f"{b}.downsample.conv.weight" in w
        x = silu(y + (conv_norm(w, f"{b}.downsample", x) if shortcut else x))
    return x


def connector(w: Weights, features: Tensor, padding: int) -> Tensor:
    """[B, T, patches, C] to [B, tokens, hidden]."""
    batch, time, patches, _ = features.shape
    side = math.isqrt(patches)
    x = features.reshape(batch * time, side, side, -1)
    x = stage(under(w, "s1."), x).reshape(batch, time, side, side, -1)
    x = torch.nn.functional.pad(x, (0, 0, *(padding,) * 6))
    kernel = w["sampler.0.weight"]  # [out, in, 2, 2, 2]
    t, h, width = (size // 2 for size in x.shape[1:4])
    y = w["sampler.0.bias"].expand(batch, t, h, width, -1)
    for dt in range(2):
        for dy in range(2):
            for dx in range(2):
                part = x[:, dt : 2 * t : 2, dy : 2 * h : 2, dx : 2 * width : 2]
                y = y + part @ kernel[:, :, dt, dy, dx].T
    y = stage(under(w, "s2."), silu(y).flatten(0, 1)).reshape(batch, t * h * width, -1)
    return linear(w, "readout.2", gelu(linear(w, "readout.0", y)))


# BEATs.


def bucket(offset: int, num_buckets: int, max_distance: int) -> int:
    half = num_buckets // 2
    exact, distance = half // 2, abs(offset)
    place = distance
    if distance >= exact:
        growth = np.log(np.float32(distance) / np.float32(exact))
        growth = np.float32(growth / np.float32(math.log(max_distance / exact)))
        place = min(exact + int(growth * np.float32(half - exact)), half - 1)
    return place + (half if offset > 0 else 0)


def beats(w: Weights, fbank: Tensor, max_distance: int) -> Tensor:
    """[B, rows, 128] to [B, tokens, hidden]."""
    x = (fbank.double() - 15.41663) / (2 * 6.55582)
    times, bins = x.shape[1] // 16, x.shape[2] // 16
    kernel = w["patch_embedding.weight"][:, 0]  # [embed, 16, 16]
    rows = [
        torch.einsum("bij,dij->bd", x[:, 16 * t : 16 * t + 16, 16 * f : 16 * f + 16], kernel)
        for t in range(times)
        for f in range(bins)
    ]
    x = linear(w, "post_extract_proj", norm(w, "layer_norm", torch.stack(rows, 1), 1e-5))
    v, g = w["encoder.pos_conv.0.weight_v"], w["encoder.pos_conv.0.weight_g"]
    kernel = g * v / (v.square().sum((0, 1), keepdim=True) + 1e-6).sqrt()
    steps, length, width, per_group = v.shape[2], x.shape[1], x.shape[2], v.shape[1]
    padded = torch.nn.functional.pad(x, (0, 0, steps // 2, steps // 2))
    conv = torch.zeros_like(x)
    for channel in range(width):
        first = channel // per_group * per_group
        for step in range(steps):
            part = padded[:, step : step + length, first : first + per_group]
            conv[..., channel] += part @ kernel[channel, :, step]
    x = x + gelu(conv + w["encoder.pos_conv.0.bias"])
    x = norm(w, "encoder.layer_norm", x, 1e-5)
    table = w["encoder.layers.0.self_attn.relative_attention_bias.weight"]
    num_buckets, num_heads = table.shape
    index = [
        [bucket(k - q, num_buckets, max_distance) for k in range(length)] for q in range(length)
    ]
    bias = table[torch.tensor(index)]  # [query, key, heads]
    layers = sum(name.endswith(".fc1.weight") for name in w)
    scale = (2 * layers) ** 0.25
    for number in range(layers):
        layer = under(w, f"encoder.layers.{number}.")
        q, k, v = (heads(linear(layer, f"self_attn.{n}_proj", x), num_heads) for n in "qkv")
        outputs = []
        for head in range(num_heads):
            eight = linear(layer, "self_attn.grep_linear", q[:, head])
            a, b = torch.sigmoid(eight[..., :4].sum(-1)), torch.sigmoid(eight[..., 4:].sum(-1))
            gate = a * (b * layer["self_attn.grep_a"][0, head, 0, 0] - 1) + 2  # [B, S]
            outputs.append(
                attend(q[:, head], k[:, head], v[:, head], gate[..., None] * bias[..., head])
            )
        y = linear(layer, "self_attn.out_proj", torch.cat(outputs, -1))
        x = norm(layer, "self_attn_layer_norm", scale * x + y, 1e-5)
        y = linear(layer, "fc2", gelu(linear(layer, "fc1", x)))
        x = norm(layer, "final_layer_norm", scale * x + y, 1e-5)
    return x


# The language model: Mistral, Mixtral with two experts a token, Qwen2.


def rms_norm(weight: Tensor, x: Tensor, eps: float = 1e-5) -> Tensor:
    return weight * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def rotated(x: Tensor, theta: float) -> Tensor:
    """[B, H, S, D], positions 0, 1, ..."""
    half = x.shape[-1] // 2
    angles = torch.arange(x.shape[2])[:, None] / theta ** (torch.arange(half) / half)
    cos, sin = angles.double().cos(), angles.double().sin()
    one, other = x[..., :half], x[..., half:]
    return torch.cat([one * cos - other * sin, other * cos + one * sin], -1)


def feed_forward(w: Weights, x: Tensor) -> Tensor:
    if "mlp.gate_proj.weight" in w:
        gate = silu(linear(w, "mlp.gate_proj", x))
        return linear(w, "mlp.down_proj", gate * linear(w, "mlp.up_proj", x))
    experts = []
    for number in range(4):
        one = under(w, f"block_sparse_moe.experts.{number}.")
        experts.append(linear(one, "w2", silu(linear(one, "w1", x)) * linear(one, "w3", x)))
    chances = linear(w, "block_sparse_moe.gate", x).softmax(-1)
    best = chances.topk(2)
    weights = torch.zeros_like(chances).scatter(-1, best.indices, best.values)
    weights = weights / weights.sum(-1, keepdim=True)
    return (torch.stack(experts, -1) * weights[..., None, :]).sum(-1)


def language(
    w: Weights, embeds: Tensor, layers: int, num_heads: int, kv_heads: int, theta: float
) -> Tensor:
    """Embeddings [B, S, hidden] to logits."""
    x = embeds.double()
    length = x.shape[1]
    blocked = torch.full((length, length), -torch.inf, dtype=torch.float64).triu(1)
    for number in range(layers):
        layer = under(w, f"model.layers.{number}.")
        y = rms_norm(layer["input_layernorm.weight"], x)
        q = rotated(heads(linear(layer, "self_attn.q_proj", y), num_heads), theta)
        k = rotated(heads(linear(layer, "self_attn.k_proj", y), kv_heads), theta)
        v = heads(linear(layer, "self_attn.v_proj", y), kv_heads)
        k, v = (part.repeat_interleave(num_heads // kv_heads, 1) for part in (k, v))
        x = x + linear(layer, "self_attn.o_proj", merged(attend(q, k, v, blocked)))
        y = rms_norm(layer["post_attention_layernorm.weight"], x)
        x = x + feed_forward(layer, y)
    return linear(under(w, ""), "lm_head", rms_norm(w["model.norm.weight"].double(), x))
