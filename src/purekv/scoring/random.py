"""Random eviction: the floor that every method must clear."""

from dataclasses import dataclass
from hashlib import sha256

import torch
from torch import Tensor

from purekv.scoring.base import LayerInputs


@dataclass(frozen=True)
class Random:
    """Uniform scores, drawn for each row by itself and the same on every device.

    The seed is the layer and what is shown where: the tokens before, between and behind the visual
    spans, and their grids. A row of a padded batch draws as it would alone; prompts that differ in
    nothing but their words draw alike.
    """

    seed: int = 0

    def observes(self, layer_idx: int) -> bool:
        return False

    def observe(self, layer: LayerInputs) -> Tensor:
        raise NotImplementedError

    def score(self, layer: LayerInputs, observed: Tensor | None) -> Tensor:
        heads, length = layer.value.shape[1] * layer.shards.size, layer.value.shape[2]
        is_token = layer.layout.is_token.cpu()
        score = torch.zeros(is_token.shape[0], heads, length)
        for row, (tokens, spans) in enumerate(zip(is_token, layer.layout.spans, strict=True)):
            shown = [(int(tokens[: span.start].sum()), span.grid, span.modality) for span in spans]
            count = int(tokens.sum())
            key = repr((self.seed, layer.layer_idx, count, shown)).encode()
            seed = int.from_bytes(sha256(key).digest()[:8], "big", signed=True)
            generator = torch.Generator().manual_seed(seed)
            score[row, :, tokens] = torch.rand(heads, count, generator=generator)
        return layer.shards.own(score).to(layer.value.device)
