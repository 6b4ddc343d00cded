"""What vLLM should answer, by transformers alone: prefill, evict, decode token by token.

Attention rows come from eager attention, scores and choices are written out: nothing of purekv is
used but how many entries stay.
"""

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from purekv.serving.hole import Room


class Reference:
    """A model whose prompts are compacted as a server with these settings should."""

    def __init__(
        self,
        model: PreTrainedModel,
        scorer: str,
        room: Room,
        sinks: int,
        window: int,
        sources: tuple[int, ...],
        block_size: int,
        visual: tuple[int, ...] = (),
    ) -> None:
        self._model, self._scorer, self._room = model, scorer, room
        self._sinks, self._window, self._sources = sinks, window, sources
        self._block_size, self._visual = block_size, visual

    @torch.inference_mode()
    def answer(self, prompt: list[int], new_tokens: int, **media: Tensor) -> list[int]:
        """Greedy tokens behind the prompt, which has a token for each part of its media."""
        cache, base = DynamicCache(), self._model.base_model
        base.rope_deltas = None  # models with images have those of the last prompt
        output = self._model(
            torch.tensor([prompt]),
            past_key_values=cache,
            output_attentions=True,
            use_cache=True,
            **media,
        )
        hole = self._room.hole(len(prompt), self._block_size)
        if hole is not None:
            self._evict(cache, output.attentions, hole.kept, prompt)
        tokens = [int(output.logits[0, -1].argmax())]
        behind = len(prompt) + (0 if base.rope_deltas is None else int(base.rope_deltas))
        while len(tokens) < new_tokens:
            position = torch.tensor([[behind + len(tokens) - 1]])
            output = self._model(
                torch.tensor([tokens[-1:]]), past_key_values=cache, position_ids=position
            )
            tokens.append(int(output.logits[0, -1].argmax()))
        return tokens

    def _ends(self, prompt: list[int], kept: int) -> tuple[list[int], int]:
        """Positions that stay whatever their scores, and the first one that observes."""
        visual = [place for place, token in enumerate(prompt) if token in self._visual]
        text = [place for place, token in enumerate(prompt) if token not in self._visual]
        window = len(prompt) - self._window
        observing = visual[-1] + 1 if visual else window
        if visual and len(text) < kept:
            return text, observing
        return [*range(self._sinks), *range(window, len(prompt))], observing

    def _evict(
        self, cache: DynamicCache, attentions: tuple[Tensor, ...], kept: int, prompt: list[int]
    ) -> None:
        stay, observing = self._ends(prompt, kept)
        observed = None
        for idx, layer in enumerate(cache.layers):
            rows = attentions[idx][0, :, observing:].float()  # [Hq, W, N]
            if idx < self._sources[0] or idx in self._sources:
                observed = rows.mean((0, 1))
            scores = self._score(rows, observed, layer.keys[0], layer.values[0])
            scores[:, stay] = torch.inf
            best = scores.sort(descending=True, stable=True).indices  # of equals, the earlier
            index = best[:, :kept].sort().values[..., None]  # [Hkv, B, 1]
            index = index.expand(-1, -1, layer.keys.shape[-1])
            layer.keys = layer.keys[0].gather(1, index)[None]
            layer.values = layer.values[0].gather(1, index)[None]

    def _score(self, rows: Tensor, observed: Tensor | None, key: Tensor, value: Tensor) -> Tensor:
        """[Hkv, N]."""
        if self._scorer == "value_norm":
            return value.norm(dim=-1)
        if self._scorer == "clie":
            assert observed is not None
            return observed * value.norm(dim=-1)
        assert self._scorer == "snapkv"
        mean = rows.mean(1).unflatten(0, (key.shape[0], -1)).mean(1)
        return torch.nn.functional.max_pool1d(mean, 7, stride=1, padding=3)
