"""Where M-RoPE places the text behind a cached prompt; transformers keeps that on the model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel


@dataclass(frozen=True)
class TextPositions:
    """Offsets between a token's number and its position, of a prompt's rows.

    While `generate` answers, positions go on from the prompt's last token; where it is given a
    filled cache, they go on behind the furthest position of the prompt. A video of more temporal
    patches than rows of tokens reaches further than the text behind it, so the two differ: a prompt
    whose last token runs on a cache needs the first, a later turn gets the second, as from
    transformers.
    """

    deltas: Tensor | None
    """Of later turns [B, 1]; None for models without M-RoPE."""
    reach: Tensor | int = 0
    """How much further the prompt's positions reach than its last token [B, 1]."""

    @classmethod
    def of_prompt(cls, model: PreTrainedModel, position_ids: Tensor | None) -> TextPositions:
        """Those of the prompt that `model` has just run at `position_ids` [3 or 4, B, S]."""
        deltas = getattr(model.base_model, "rope_deltas", None)
        if deltas is None or position_ids is None or position_ids.ndim < 3:
            return cls(deltas)
        places = position_ids[-3:]
        return cls(deltas, (places.amax((0, 2)) - places[:, :, -1].amax(0))[:, None])

    def repeat(self, copies: int) -> TextPositions:
        if self.deltas is None:
            return self
        reach = self.reach
        return TextPositions(
            self.deltas.repeat(copies, 1),
            reach.repeat(copies, 1) if isinstance(reach, Tensor) else reach,
        )

    def answer(self, model: PreTrainedModel) -> None:
        """Let the model go on right behind the prompt."""
        if self.deltas is not None:
            model.base_model.rope_deltas = self.deltas - self.reach

    def go_on(self, model: PreTrainedModel) -> None:
        """Let the model place further turns."""
        if self.deltas is not None:
            model.base_model.rope_deltas = self.deltas


@contextmanager
def first_positions(model: PreTrainedModel) -> Iterator[list[Tensor | None]]:
    """The `position_ids` of the first forward of the model in the block."""
    found: list[Tensor | None] = []

    def look(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if not found:
            found.append(kwargs.get("position_ids"))

    hook = model.register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield found
    finally:
        hook.remove()
