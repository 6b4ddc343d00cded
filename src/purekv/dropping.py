"""Tokens that deeper layers do not compute at all (`evict="drop"`)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from purekv.selection import Selection


@dataclass(frozen=True)
class Kept:
    """Positions of a sequence that go on, the same for all heads; fewer rows are padded left."""

    index: Tensor
    """int64 [B, width], ascending; 0 at padding."""
    is_token: Tensor
    """bool [B, width], False at padding."""

    @classmethod
    def of(cls, selection: Selection) -> "Kept":
        """`selection`: of a layer of one head."""
        index = selection.index[:, 0]
        is_token = selection.is_entry
        if is_token is None:
            is_token = torch.ones_like(index, dtype=torch.bool)
        return cls(index, is_token.to(index.device))

    @property
    def width(self) -> int:
        return self.index.shape[1]

    def take(self, x: Tensor, behind: int) -> Tensor:
        """The kept positions of x [..., B or 1, S, *rest], where `rest` has so many dimensions."""
        dim = x.ndim - 1 - behind
        shape = [1] * x.ndim
        shape[dim - 1], shape[dim] = self.index.shape
        index = self.index.to(x.device).view(shape)
        wanted = list(x.shape)
        wanted[dim - 1] = self.index.shape[0]
        x = x.expand(wanted)
        wanted[dim] = self.width
        return x.gather(dim, index.expand(wanted))

    def of_these(self, fewer: "Kept") -> "Kept":
        """`fewer` positions of the kept ones, as positions of the whole."""
        return Kept(fewer.take(self.index, 0), fewer.is_token)


def stage_quotas(visual: Sequence[int], quota: Sequence[int], stages: int) -> list[list[int]]:
    """Visual tokens that each row still computes after each stage: equal shares from one to the
    next, and the quota after the last."""
    return [
        [
            max(kept, round(count * (kept / count) ** (stage / stages))) if count else 0
            for count, kept in zip(visual, quota, strict=True)
        ]
        for stage in range(1, stages + 1)
    ]
