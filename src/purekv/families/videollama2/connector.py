"""The spatial-temporal convolution connector of VideoLLaMA2 (arXiv:2406.07476, section 2)."""

import math

from torch import Tensor, nn

from purekv.families.videollama2.regstage import RegStage


class STCConnector(nn.Module):
    """Halves time, height and width of a video's features between two RegNet stages.

    A slot of its output therefore mixes two frames.

    Args:
        channels: of the vision tower's features.
        hidden_size: of the language model, and of everything inside.
        padding: zeros around time, height and width before halving.
    """

    def __init__(self, channels: int, hidden_size: int, padding: int) -> None:
        super().__init__()
        self.s1 = RegStage(channels, hidden_size)
        self.sampler = nn.Sequential(
            nn.Conv3d(hidden_size, hidden_size, 2, stride=2, padding=padding), nn.SiLU()
        )
        self.s2 = RegStage(hidden_size, hidden_size)
        self.readout = nn.Sequential(
            nn.Linear(hidden_size, hidden_size), nn.GELU(), nn.Linear(hidden_size, hidden_size)
        )

    def forward(self, features: Tensor) -> Tensor:
        """[B, T, height * width, channels] of square frames to [B, tokens, hidden_size], tokens
        in order of time, height, width."""
        batch, time, patches, _ = features.shape
        side = math.isqrt(patches)
        x = features.flatten(0, 1).transpose(1, 2).unflatten(2, (side, side))  # [B * T, C, h, w]
        x = self.s1(x).unflatten(0, (batch, time)).transpose(1, 2)
        x = self.sampler(x).transpose(1, 2)  # [B, T', hidden_size, h', w']
        time = x.shape[1]
        x = self.s2(x.flatten(0, 1)).flatten(2).unflatten(0, (batch, time))
        return self.readout(x.transpose(2, 3).flatten(1, 2))
