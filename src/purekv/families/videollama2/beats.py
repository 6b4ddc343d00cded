"""BEATs, the audio tower of VideoLLaMA2.1-AV (arXiv:2212.09058): filter banks to tokens.

A transformer with post-norm and deep-norm scaling, a weight-normed positional convolution, and
bucketed relative positions (T5, arXiv:1910.10683) that every layer gates by its queries
(gated relative position bias, arXiv:2106.16138). Names are upstream's.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.functional import conv1d, gelu, scaled_dot_product_attention

from purekv.errors import PureKVError

FBANK_MEAN, FBANK_STD = 15.41663, 6.55582
_FIRST = "encoder.layers.0"


@dataclass(frozen=True)
class BEATsConfig:
    patch_size: int = 16
    embed_dim: int = 512
    """Of patches."""
    hidden_size: int = 768
    """Of tokens."""
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    conv_kernel: int = 128
    conv_groups: int = 16
    num_buckets: int = 320
    max_distance: int = 800
    """Tokens from which on all distances share a bucket. Only this does not show in weights."""

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, Sequence[int]], **overrides: int) -> "BEATsConfig":
        """Read off the shapes of a checkpoint's tensors, named as here.

        Raises:
            PureKVError: a tensor is missing, or an override is unknown.
        """
        unknown = set(overrides) - set(cls.__dataclass_fields__)
        if unknown:
            raise PureKVError(
                f"unknown beats setting {', '.join(sorted(unknown))}; known are "
                f"{', '.join(cls.__dataclass_fields__)}"
            )
        try:
            embed_dim, _, patch_size, _ = shapes["patch_embedding.weight"]
            hidden_size, per_group, conv_kernel = shapes["encoder.pos_conv.0.weight_v"]
            num_buckets, heads = shapes[f"{_FIRST}.self_attn.relative_attention_bias.weight"]
            config = cls(
                patch_size=patch_size,
                embed_dim=embed_dim,
                hidden_size=hidden_size,
                intermediate_size=shapes[f"{_FIRST}.fc1.weight"][0],
                num_hidden_layers=sum(name.endswith(".fc1.weight") for name in shapes),
                num_attention_heads=heads,
                conv_kernel=conv_kernel,
                conv_groups=hidden_size // per_group,
                num_buckets=num_buckets,
            )
        except KeyError as error:
            raise PureKVError(
                f"the checkpoint has an audio tower without {error.args[0]}; download it again"
            ) from error
        return replace(config, **overrides)


class PositionalConv(nn.Module):
    """Convolution over time whose weight is g * v / |v|, |v| over all but the kernel's steps."""

    def __init__(self, channels: int, kernel_size: int, groups: int) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(1, 1, kernel_size))
        self.weight_v = nn.Parameter(torch.empty(channels, channels // groups, kernel_size))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, channels] to the same."""
        norm = (self.weight_v.square().sum((0, 1), keepdim=True) + 1e-6).sqrt()
        weight = self.weight_g * self.weight_v / norm
        padding = weight.shape[-1] // 2
        y = conv1d(x.transpose(1, 2), weight, self.bias, padding=padding, groups=self.groups)
        return y[..., : x.shape[1]].transpose(1, 2)  # an even kernel makes a step too many


class GatedAttention(nn.Module):
    def __init__(self, config: BEATsConfig) -> None:
        super().__init__()
        width, heads = config.hidden_size, config.num_attention_heads
        self.num_heads, self.head_dim = heads, width // heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            nn.Linear(width, width) for _ in range(4)
        )
        self.grep_linear = nn.Linear(self.head_dim, 8)
        self.grep_a = nn.Parameter(torch.ones(1, heads, 1, 1))

    def forward(self, x: Tensor, position_bias: Tensor) -> Tensor:
        """x [B, S, hidden], position_bias [num_heads, S, S]; answers [B, S, hidden]."""
        query, key, value = (
            proj(x).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        gates = self.grep_linear(query).unflatten(-1, (2, 4)).sum(-1).sigmoid()  # [B, H, S, 2]
        update, reset = gates.split(1, dim=-1)
        bias = (update * (reset * self.grep_a - 1.0) + 2.0) * position_bias
        output = scaled_dot_product_attention(query, key, value, attn_mask=bias)
        return self.out_proj(output.transpose(1, 2).flatten(2))


class BEATsLayer(nn.Module):
    def __init__(self, config: BEATsConfig) -> None:
        super().__init__()
        self.self_attn = GatedAttention(config)
        self.self_attn_layer_norm = nn.LayerNorm(config.hidden_size)
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size)
        self.residual_scale = (2 * config.num_hidden_layers) ** 0.25  # DeepNet, arXiv:2203.00555

    def forward(self, x: Tensor, position_bias: Tensor) -> Tensor:
        x = self.self_attn_layer_norm(self.residual_scale * x + self.self_attn(x, position_bias))
        return self.final_layer_norm(self.residual_scale * x + self.fc2(gelu(self.fc1(x))))


class BEATsEncoder(nn.Module):
    def __init__(self, config: BEATsConfig) -> None:
        super().__init__()
        self.pos_conv = nn.Sequential(
            PositionalConv(config.hidden_size, config.conv_kernel, config.conv_groups), nn.GELU()
        )
        self.layer_norm = nn.LayerNorm(config.hidden_size)
        self.layers = nn.ModuleList(BEATsLayer(config) for _ in range(config.num_hidden_layers))
        # One table for all layers; in checkpoints every layer has a copy of it.
        self.layers[0].self_attn.relative_attention_bias = nn.Embedding(
            config.num_buckets, config.num_attention_heads
        )
        self.max_distance = config.max_distance

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer_norm(x + self.pos_conv(x))
        table = self.layers[0].self_attn.relative_attention_bias
        buckets = relative_buckets(x.shape[1], table.num_embeddings, self.max_distance)
        position_bias = table(buckets.to(x.device)).permute(2, 0, 1)  # [heads, S, S]
        for layer in self.layers:
            x = layer(x, position_bias)
        return x


def relative_buckets(length: int, num_buckets: int, max_distance: int) -> Tensor:
    """int64 [length, length] of query and key: half of the buckets are for keys ahead; of each
    half, the first half are exact distances and the rest grow with their logarithm."""
    positions = torch.arange(length)
    offset = positions - positions[:, None]
    half = num_buckets // 2
    exact = half // 2
    distance = offset.abs()
    # Upstream rounds down in float32; another precision would move distances between buckets.
    growth = (distance.clamp(min=1).float() / exact).log() / math.log(max_distance / exact)
    far = (exact + (growth * (half - exact)).long()).clamp(max=half - 1)
    return torch.where(distance < exact, distance, far) + half * (offset > 0)


class BEATs(nn.Module):
    """A classifier's head (`predictor`) in checkpoints is not used and not built."""

    def __init__(self, config: BEATsConfig) -> None:
        super().__init__()
        size = config.patch_size
        self.patch_embedding = nn.Conv2d(1, config.embed_dim, size, stride=size, bias=False)
        self.layer_norm = nn.LayerNorm(config.embed_dim)
        self.post_extract_proj: nn.Module = (
            nn.Linear(config.embed_dim, config.hidden_size)
            if config.embed_dim != config.hidden_size
            else nn.Identity()
        )
        self.encoder = BEATsEncoder(config)

    def forward(self, fbank: Tensor) -> Tensor:
        """[B, rows, mel bins] of `fbank.fbank` to tokens [B, rows // 16 * bins // 16, hidden],
        moment after moment, low frequencies first; rows left over are dropped."""
        fbank = (fbank - FBANK_MEAN) / (2 * FBANK_STD)
        patches = self.patch_embedding(fbank[:, None]).flatten(2).transpose(1, 2)
        return self.encoder(self.post_extract_proj(self.layer_norm(patches)))
