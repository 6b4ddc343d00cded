"""The rotary embedding of one prompt, for scorers that must see queries without it."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Rotation:
    """Rotary angles of a prompt's positions, however the family makes them (M-RoPE included).

    Halves of the head are rotated against each other, as `rotate_half` of transformers does.
    """

    cos: Tensor
    """[B or 1, S, D], as applied; its factor of attention scaling included."""
    sin: Tensor
    """[B or 1, S, D]."""
    position_ids: Tensor
    """[B or 1, S], or [3, B or 1, S] for M-RoPE."""
    module: nn.Module
    """The model's own rotary embedding."""
    layer_type: str | None = None
    """Whose angles they are, of a module that has them for several types of layers."""

    def to(self, device: torch.device) -> "Rotation":
        cos, sin = self.cos.to(device), self.sin.to(device)
        return Rotation(cos, sin, self.position_ids, self.module, self.layer_type)

    def undo(self, rotated: Tensor, part: slice) -> Tensor:
        """What was rotated, float32: rotated [B, H, n, D] are the positions `part`."""
        cos, sin = self.cos[:, None, part].float(), self.sin[:, None, part].float()
        # Divided by the squared length, as scaling and low precision change it.
        return turn(rotated.float(), cos, -sin) / (cos.square() + sin.square())

    def following(self, count: int) -> tuple[Tensor, Tensor]:
        """Mean cos and sin, float32 [B or 1, D], of the next `count` positions of text.

        Text behind a prompt goes on from its largest position, the same in all parts of M-RoPE.
        """
        parts = (-1,) if self.position_ids.ndim == 2 else (0, -1)
        last = self.position_ids.amax(parts)[:, None]  # [B, 1]
        following = last + torch.arange(1, count + 1, device=last.device)
        following = following.expand(*self.position_ids.shape[:-1], count)
        # Not called but run: our own hook would take these positions for the prompt's.
        kind = () if self.layer_type is None else (self.layer_type,)
        angles = self.module.forward(self.cos.float().to(last.device), following, *kind)
        cos, sin = (x.mean(1).to(self.cos.device) for x in angles)
        return cos, sin


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the halves of x [..., D] against each other; cos and sin broadcast to it."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin
