"""A run that remembers: each layer's attention, value norms, scores and what it kept."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from purekv.attach import Run
from purekv.config import PureKVConfig
from purekv.errors import PureKVError
from purekv.layout import VisualSpan
from purekv.prefill import Prefill, Scoring
from purekv.scoring import Attended, LayerInputs
from purekv.window import observation_window, window_attention

# Shapes: L layers, H query heads, G KV heads, S positions, V visual tokens.


@dataclass(frozen=True)
class Recording:
    """What one prefill's attention saw. On the CPU."""

    window: Tensor
    """[L, H, S]; mean attention of the observing queries."""
    last: Tensor
    """[L, H, S]; attention of the last prompt token."""
    norm: Tensor
    """[L, G, S]; L2 norm of the values."""
    score: Tensor | None
    """[L, G, V]; importance, as the config's scorer has it. None if nothing was evicted."""
    kept: Tensor | None
    """bool [L, G, V]; which visual tokens stayed. None if nothing was evicted."""
    is_visual: Tensor
    """bool [S]"""
    is_tail: Tensor
    """bool [S]; the question's tokens."""
    spans: tuple[VisualSpan, ...]

    @property
    def own(self) -> Tensor:
        """[L, G, V]; the window's visual attention, mean over the query heads of a KV head."""
        groups = self.norm.shape[1]
        return self.window.unflatten(1, (groups, -1)).mean(2)[..., self.is_visual]

    @property
    def visual_attention(self) -> Tensor:
        """[L, V]; mean over all heads, as CLIE's sources measure it."""
        return self.window.mean(1)[:, self.is_visual]

    @property
    def visual_norm(self) -> Tensor:
        """[L, G, V]"""
        return self.norm[..., self.is_visual]


def check_all_computed(config: PureKVConfig) -> None:
    """Raises PureKVError for a config, or its plan, by which layers miss tokens."""
    if config.evict == "drop" or config.prune is not None:
        raise PureKVError(
            "inspect shows what every layer makes of every token, and evict='drop' or prune leaves "
            "some out; choose others, or another plan"
        )


class Recorder(Run):
    """A run whose `recording` holds the last prefill. Batches of one.

    Attention rows are computed for every layer, in float32: slower than the run that it shows, with
    the same result.
    """

    _looks_on = True

    def __init__(self, config: PureKVConfig, model: PreTrainedModel) -> None:
        check_all_computed(config)
        super().__init__(config, model)
        self.recording: Recording | None = None

    def _before_model(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        super()._before_model(module, args, kwargs)
        if self._prefill is not None:
            self._attention: list[tuple[Tensor, ...]] = []
            self._scores: list[Tensor] = []
            self._kept: list[Tensor] = []
            self._prefill.scoring = _RecordedScoring(self._prefill.scoring, self._scores)
            self._prefill.select = self._recorded(self._prefill.select)

    def _recorded(self, select: Callable[..., Any]) -> Callable[..., Any]:
        def recorded(attended: Attended) -> Any:
            selection = select(attended)
            self._kept.append(selection.mask(attended.query.shape[2])[0].cpu())
            return selection

        return recorded

    def _evict(self, prefill: Prefill, attended: Attended) -> Any:
        selection = super()._evict(prefill, attended)
        query, key, scaling = attended.query, attended.key, attended.scaling
        is_token = prefill.layout.is_token.to(key.device)
        norm = torch.linalg.vector_norm(attended.value[0], dim=-1, dtype=torch.float32)
        windows = (
            observation_window(prefill.layout, kind).to(key.device)
            for kind in (self.config.window, 1)
        )
        rows = [window_attention(query, key, scaling, window, is_token) for window in windows]
        self._attention.append((*(row[0].flatten(0, 1).cpu() for row in rows), norm.cpu()))
        return selection

    def _after_language_model(
        self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any
    ) -> Any:
        prefill = self._prefill
        output = super()._after_language_model(module, args, kwargs, output)
        if prefill is not None:
            layout = prefill.layout
            visual = layout.is_visual[0]
            window, last, norm = (torch.stack(part) for part in zip(*self._attention, strict=True))
            self.recording = Recording(
                window,
                last,
                norm,
                torch.stack(self._scores)[..., visual] if self._scores else None,
                torch.stack(self._kept)[..., visual] if self._kept else None,
                visual,
                layout.is_tail[0],
                layout.spans[0],
            )
        return output


class _RecordedScoring(Scoring):
    """Scores as another one would, and keeps a copy."""

    def __init__(self, scoring: Scoring, scores: list[Tensor]) -> None:
        super().__init__(scoring._scorer)
        self._scores = scores

    def score(self, layer: LayerInputs) -> Tensor:
        score = super().score(layer)
        self._scores.append(score[0].float().cpu())
        return score
