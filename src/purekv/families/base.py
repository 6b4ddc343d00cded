"""What purekv must know of a model family: where its parts are and where its visual tokens go."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from purekv.errors import PureKVError
from purekv.layout import Layout, VisualSpan

Grid = tuple[int, int, int]
"""Tokens in time, height and width."""
TokenRun = list[int]
"""Row, start and length of tokens of one kind that follow each other."""


@dataclass(frozen=True)
class Placeholder:
    """How one modality appears in a prompt."""

    modality: str
    runs: Sequence[TokenRun]
    """Its tokens, in reading order."""
    grids: Sequence[Grid]
    """Of each item, in prompt order. There may be text between the frames of one item."""


class Family:
    """Adapter of one model family. Holds no state.

    A family says where the parts of its model are and which tokens of a prompt are visual; the
    defaults fit most of transformers' models.
    """

    name: str = ""
    """For people."""
    model_types: tuple[str, ...] = ()
    """`config.model_type` of the models it serves."""
    native: bool = True
    """Whether its models are transformers' own; else they come with purekv."""
    checkpoints: tuple[str, ...] = ()
    """Published checkpoints, as examples for documentation."""
    modalities: tuple[str, ...] = ("image", "video")
    """What its prompts show."""
    attention: tuple[str, ...] = ("sdpa", "eager", "flash_attention_2", "flash_attention_3")
    """Attention implementations that it can run on."""
    sparse: bool = True
    """Whether the frames of its videos are found, which `prefill="spatiotemporal"` needs."""
    tested_on: tuple[str, ...] = ("tiny random models: image, images, video, mixed; sdpa, eager",)
    """What runs in our tests, for documentation; `tests/families` compares."""
    limits: str = ""
    """What does not work, for documentation."""
    pixel_arguments: tuple[str, ...] = ("pixel_values", "pixel_values_videos")
    """Forward arguments that carry pixels or sound."""
    packed_tower: bool = False
    """Whether the vision tower runs all pixels as one sequence with `cu_seqlens`."""
    stock_masks: bool = False
    """Whether a prompt's mask has to be the one that the model makes; else it is causal."""
    half_rotation: bool = True
    """Whether the rotary embedding turns the halves of a head against each other."""
    full_length_arguments: tuple[str, ...] = ()
    """Arguments of the decoder that belong to the visual tokens of a whole prompt; left out where
    only text runs."""

    def multimodal_model(self, model: nn.Module) -> nn.Module:
        """The module whose forward takes `input_ids` and pixels."""
        return getattr(model, "model", model)

    def language_model(self, model: nn.Module) -> nn.Module:
        """The decoder stack: takes `inputs_embeds`, has `.config` and `.layers`."""
        return self.multimodal_model(model).language_model

    def rotary_embedding(self, model: nn.Module) -> nn.Module:
        """The decoder's rotary embedding: called with (hidden, position_ids), once a forward, it
        answers the (cos, sin) [B, S, D] that turn the halves of every head."""
        return self.language_model(model).rotary_emb

    def output_projection(self, model: nn.Module, layer_idx: int) -> nn.Module:
        """Of a layer's attention: [..., num_attention_heads * D] to [..., hidden]."""
        return self.language_model(model).layers[layer_idx].self_attn.o_proj

    def vision_tower(self, model: nn.Module) -> nn.Module | None:
        """None if there is none."""
        return self.multimodal_model(model).vision_tower

    def undroppable_layers(self, config: Any) -> int:
        """First layers behind which visual features of all tokens are added."""
        return 0

    def encoders(self, model: nn.Module) -> tuple[nn.Module, ...]:
        """The modules that make features of pixels and sound, one after another."""
        tower = self.vision_tower(model)
        return () if tower is None else (tower,)

    def visual_token_ids(self, config: Any) -> dict[str, int]:
        """The placeholder id of each modality."""
        return {"image": config.image_token_id}

    def placeholders(self, config: Any, inputs: Mapping[str, Any]) -> list[Placeholder]:
        """The visual items of a forward call with these arguments; `input_ids` is on the CPU."""
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
        ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
        if ids is None:
            raise PureKVError("the visual tokens are found from input_ids; pass them to the model")
        if mask is not None and mask.shape != ids.shape:
            raise PureKVError(
                f"attention_mask of shape {tuple(mask.shape)} is not supported; "
                f"pass the tokenizer's mask of shape {tuple(ids.shape)}"
            )
        ids = ids.cpu()
        inputs = {**inputs, "input_ids": ids}
        is_token = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.cpu().bool()
        spans: list[list[VisualSpan]] = [[] for _ in range(ids.shape[0])]
        for placeholder in self.placeholders(config, inputs):
            for row, span in _find_spans(placeholder):
                spans[row].append(span)
        for row_spans in spans:
            row_spans.sort(key=lambda span: span.start)
        return Layout.build(is_token, spans)


def token_runs(is_here: Tensor) -> list[TokenRun]:
    """Runs of True in is_here [B, S], which is on the CPU, in reading order."""
    runs = []
    for row, flags in enumerate(is_here.numpy()):
        # Bytes are searched in no time; a dozen small tensor calls would hold up a GPU.
        flat = flags.tobytes()
        start = flat.find(1)
        while start >= 0:
            stop = flat.find(0, start)
            stop = len(flat) if stop < 0 else stop
            runs.append([row, start, stop - start])
            start = flat.find(1, stop)
    return runs


def encoded_lengths(inputs: Mapping[str, Any], modality: str) -> list[int] | None:
    """Tokens of each item, where `generate` has encoded the pixels before the model runs."""
    encoded = (inputs.get("mm_encoder_outputs") or {}).get(modality)
    return None if encoded is None else [len(item) for item in encoded.pooler_output]


def _find_spans(placeholder: Placeholder) -> list[tuple[int, VisualSpan]]:
    """Give each item its placeholder tokens; rows and items are in the same order."""
    tokens = sum(length for _, _, length in placeholder.runs)
    wanted = sum(t * h * w for t, h, w in placeholder.grids)
    if tokens != wanted:
        raise PureKVError(
            f"the prompt has {tokens} {placeholder.modality} tokens and the pixels make {wanted}; "
            "build both with one call of the model's own processor, and set no prefill_chunk_size"
        )
    grids = iter(placeholder.grids)
    found: list[tuple[int, VisualSpan]] = []
    missing = height = width = owner = 0  # frames that the item at hand still lacks
    for row, start, length in placeholder.runs:
        stop = start + length
        while start < stop:  # items may follow each other without text between them
            continues = missing > 0
            if not continues:
                missing, height, width = next(grids)
                owner = row
            frames = min(missing, (stop - start) // (height * width))
            if not frames or row != owner:
                raise PureKVError(
                    f"the {placeholder.modality} tokens at position {start} of row {row} are not "
                    "consecutive; build the prompt with the model's own processor"
                )
            span = VisualSpan(start, (frames, height, width), placeholder.modality, continues)
            found.append((row, span))
            start += span.length
            missing -= frames
    return found
