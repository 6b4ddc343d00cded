"""A stage of RegNet blocks (arXiv:2003.13678, with squeeze-and-excitation), as VideoLLaMA2 has it.

Names and numbers follow timm's RegStage at bottleneck ratio 1, stride 1 and group width 1:
convolutions without bias, LayerNorm over the channels of each pixel (eps 1e-5), SiLU everywhere.
"""

from torch import Tensor, nn
from torch.nn.functional import layer_norm, silu


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of [N, C, H, W]."""

    def forward(self, x: Tensor) -> Tensor:
        x = layer_norm(x.movedim(1, -1), self.normalized_shape, self.weight, self.bias, self.eps)
        return x.movedim(-1, 1)


class ConvNorm(nn.Module):
    def __init__(self, channels: int, out_channels: int, kernel_size: int = 1, groups: int = 1):
        super().__init__()
        padding = kernel_size // 2
        self.conv = nn.Conv2d(
            channels, out_channels, kernel_size, padding=padding, groups=groups, bias=False
        )
        self.bn = ChannelNorm(out_channels, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))


class SqueezeExcite(nn.Module):
    """Channels gated by what the whole picture holds (arXiv:1709.01507)."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, squeezed, 1)
        self.fc2 = nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        pooled = x.mean((2, 3), keepdim=True)
        return x * self.fc2(silu(self.fc1(pooled))).sigmoid()


class Block(nn.Module):
    """1x1, depthwise 3x3, squeeze-and-excitation at a quarter of the *input's* width, 1x1."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = ConvNorm(channels, out_channels)
        self.conv2 = ConvNorm(out_channels, out_channels, 3, groups=out_channels)
        self.se = SqueezeExcite(out_channels, round(channels / 4))
        self.conv3 = ConvNorm(out_channels, out_channels)
        same = channels == out_channels
        self.downsample = nn.Identity() if same else ConvNorm(channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        y = silu(self.conv1(x))
        y = self.se(silu(self.conv2(y)))
        return silu(self.conv3(y) + self.downsample(x))


class RegStage(nn.Sequential):
    """[N, channels, H, W] to [N, out_channels, H, W] through blocks b1, b2, ..."""

    def __init__(self, channels: int, out_channels: int, depth: int = 4) -> None:
        super().__init__()
        for number in range(1, depth + 1):
            self.add_module(f"b{number}", Block(channels, out_channels))
            channels = out_channels
