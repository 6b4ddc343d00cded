"""What purekv must know of a model family: where its parts are and where its visual tokens go."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from purekv.errors import PureKVError
from purekv.layout import Layout, VisualSpan


@dataclass(frozen=True)
class Placeholder:
    """How one modality appears in `input_ids`."""

    modality: str
    token_id: int
    grids: list[tuple[int, int, int]]
    """Tokens in time, height and width of each item, in prompt order."""


class Family:
    """Adapter of one model family. Holds no state."""

    model_types: tuple[str, ...] = ()
    """`config.model_type` of the models it serves."""
    checkpoints: tuple[str, ...] = ()
    """Published checkpoints, as examples for documentation."""
    pixel_arguments: tuple[str, ...] = ()
    """Forward arguments that carry pixels."""

    def multimodal_model(self, model: nn.Module) -> nn.Module:
        """The module whose forward takes `input_ids` and pixels."""
        raise NotImplementedError

    def language_model(self, model: nn.Module) -> nn.Module:
        """The decoder stack: takes `inputs_embeds`, has `.config` and `.layers`."""
        raise NotImplementedError

    def rotary_embedding(self, model: nn.Module) -> nn.Module:
        """The decoder's rotary embedding: called with (hidden, position_ids), once a forward, it
        answers the (cos, sin) [B, S, D] that turn the halves of every head."""
        return self.language_model(model).rotary_emb

    def output_projection(self, model: nn.Module, layer_idx: int) -> nn.Module:
        """Of a layer's attention: [..., num_attention_heads * D] to [..., hidden]."""
        return self.language_model(model).layers[layer_idx].self_attn.o_proj

    def vision_tower(self, model: nn.Module) -> nn.Module:
        raise NotImplementedError

    def visual_token_ids(self, config: Any) -> dict[str, int]:
        """The placeholder id of each modality."""
        raise NotImplementedError

    def placeholders(self, config: Any, inputs: Mapping[str, Any]) -> list[Placeholder]:
        """The visual items of a forward call with these arguments."""
        raise NotImplementedError

    def layout(self, config: Any, inputs: Mapping[str, Any]) -> Layout:
        """Find the visual tokens of a prompt.

        Args:
            config: the model's.
            inputs: arguments of the multimodal model's forward: `input_ids` [B, S],
                `attention_mask` [B, S] or None, grids.

        Raises:
            PureKVError: ids are missing or do not fit the grids.
        """
        input_ids = inputs.get("input_ids")
        if input_ids is None:
            raise PureKVError("the visual tokens are found from input_ids; pass them to the model")
        ids = input_ids.cpu()
        inputs = {**inputs, "input_ids": ids}
        mask = inputs.get("attention_mask")
        if mask is None:
            is_token = torch.ones_like(ids, dtype=torch.bool)
        elif mask.ndim == 2 and mask.shape == ids.shape:
            is_token = mask.cpu().bool()
        else:
            raise PureKVError(
                f"attention_mask of shape {tuple(mask.shape)} is not supported; "
                f"pass the tokenizer's mask of shape {tuple(ids.shape)}"
            )
        spans: list[list[VisualSpan]] = [[] for _ in range(ids.shape[0])]
        for placeholder in self.placeholders(config, inputs):
            for row, span in _find_spans(ids, placeholder):
                spans[row].append(span)
        for row_spans in spans:
            row_spans.sort(key=lambda span: span.start)
        return Layout.build(is_token, spans)


def token_runs(ids: Tensor, token_id: int) -> list[list[int]]:
    """Runs of one token in ids [B, S]: [row, start, length] each, in reading order."""
    is_token = torch.nn.functional.pad((ids == token_id).to(torch.int8), (1, 1))
    edges = is_token.diff(dim=-1)
    starts, stops = (edges == 1).nonzero(), (edges == -1).nonzero()
    return torch.cat([starts, stops[:, 1:] - starts[:, 1:]], dim=1).tolist()


def _find_spans(ids: Tensor, placeholder: Placeholder) -> list[tuple[int, VisualSpan]]:
    """Give each item its placeholder tokens; rows and items are in the same order."""
    runs = token_runs(ids, placeholder.token_id)
    tokens = sum(length for _, _, length in runs)
    wanted = sum(t * h * w for t, h, w in placeholder.grids)
    if tokens != wanted:
        raise PureKVError(
            f"the prompt has {tokens} {placeholder.modality} tokens and the pixels make {wanted}; "
            "build both with one call of the model's own processor, and set no prefill_chunk_size"
        )
    grids = iter(placeholder.grids)
    found = []
    for row, start, length in runs:
        stop = start + length
        while start < stop:  # items may follow each other without text between them
            span = VisualSpan(start, next(grids), placeholder.modality)
            start += span.length
            found.append((row, span))
        if start > stop:
            raise PureKVError(
                f"the {placeholder.modality} tokens at position {span.start} of row {row} are not "
                "consecutive; build the prompt with the model's own processor"
            )
    return found
