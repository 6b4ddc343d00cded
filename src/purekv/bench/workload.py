"""A prompt on the model's device, its pixels already encoded, to be run as often as one likes."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from purekv import families


@dataclass(frozen=True)
class Workload:
    """One prompt, `batch` times over."""

    model: PreTrainedModel
    tokens: int
    """Visual tokens of a row."""
    batch: int
    inputs: dict[str, Any]
    """Arguments of the model's forward, pixels included."""
    embedded: dict[str, Any]
    """Arguments of the multimodal model's forward, embeddings in place of pixels."""
    tower_calls: list[tuple[tuple[Any, ...], dict[str, Any]]]
    """Arguments with which the vision tower was called for these pixels."""
    next_position: Tensor | None
    """int64 [3, B, 1]: the M-RoPE position behind the prompt; None where the model counts."""

    @classmethod
    @torch.inference_mode()
    def prepare(
        cls, model: PreTrainedModel, inputs: Mapping[str, Tensor], batch: int = 1
    ) -> "Workload":
        """Encode the pixels, by a forward that ends where the language model begins.

        `inputs` are of one row.
        """
        family = families.for_config(model.config)
        tokens = family.layout(model.config, inputs).visual_tokens[0]
        rows = {name: _to_model(value, model, batch) for name, value in inputs.items()}
        language, tower = family.language_model(model), family.vision_tower(model)
        tower_calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        at_language = _recorded(language, calls, stop=True)
        with (
            restored_positions(model),
            _recorded(tower, tower_calls),
            suppress(_Reached),
            at_language,
        ):
            model(**rows, use_cache=False, logits_to_keep=1)
        _, arguments = calls[0]
        position_ids = arguments.get("position_ids")
        embedded = {k: v for k, v in rows.items() if k not in family.pixel_arguments}
        embedded |= {"inputs_embeds": arguments["inputs_embeds"], "position_ids": position_ids}
        following = None
        if position_ids is not None:
            following = position_ids.amax((0, 2))[None, :, None] + 1  # [1, B, 1]
            following = following.expand(position_ids.shape[0], -1, -1)
        return cls(model, tokens, batch, rows, embedded, tower_calls, following)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def prompt_tokens(self) -> int:
        """Of a row, text included."""
        return int(self.inputs["input_ids"].shape[1])


@contextmanager
def restored_positions(model: PreTrainedModel) -> Iterator[None]:
    """Put M-RoPE's offset, which every prompt with pixels leaves on the model, back as it was."""
    module = families.for_config(model.config).multimodal_model(model)
    before = getattr(module, "rope_deltas", None)
    try:
        yield
    finally:
        if hasattr(module, "rope_deltas"):
            module.rope_deltas = before


class _Reached(Exception):
    """The module whose arguments were wanted."""


@contextmanager
def _recorded(module: nn.Module, calls: list[Any], stop: bool = False) -> Iterator[None]:
    """Note the arguments of each call; if `stop`, raise `_Reached` instead of running it."""

    def record(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        calls.append((args, kwargs))
        if stop:
            raise _Reached

    handle = module.register_forward_pre_hook(record, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _to_model(value: Tensor, model: PreTrainedModel, batch: int) -> Tensor:
    """On the model's device, in its dtype if not integers, each row `batch` times."""
    dtype = model.dtype if value.is_floating_point() and value.ndim > 1 else value.dtype
    return value.to(model.device, dtype).repeat(batch, *[1] * (value.ndim - 1))
