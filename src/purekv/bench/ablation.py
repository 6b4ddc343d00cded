"""Where the milliseconds that compression adds to a prefill go.

A run is subclassed and the objects of its one prefill are wrapped; the library's own path has no
timers in it, and nothing outlives the prefill.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from purekv import PureKVConfig
from purekv.attach import Run
from purekv.bench import phases
from purekv.bench.stopwatch import Laps
from purekv.bench.workload import Workload
from purekv.cache import cache_bytes
from purekv.prefill import Prefill
from purekv.scoring import Attended, LayerInputs

PARTS = {
    "setup": "finding the visual tokens, the window and the budget, on the host",
    "scoring_source": "scoring in layers whose attention is measured",
    "scoring_elsewhere": "scoring in all other layers",
    "certificate": "measuring how large each layer's error can be, where that was asked for",
    "selection": "the top-k of each head, and the positions of what stays",
    "compaction": "gathering what stays into smaller tensors",
    "dropping": 'leaving tokens out of the layers above (evict="drop"), their scoring included '
    "where it is done before the first layer",
    "tail_rerun": 'the question again on the compressed cache (first_token="compressed")',
    "other": "the rest of PureKV's own code",
}
_TOTAL, _SELECT = "total", "select"


@dataclass(frozen=True)
class Ablation:
    """One prefill."""

    ms: float
    """Spent in PureKV's own code."""
    parts: dict[str, float]
    """Milliseconds of each of `PARTS`; they sum to `ms`."""
    whole: phases.Measured
    """The prefill, timers included."""
    kv_bytes_peak: int
    """Most bytes that the cache held at once, behind any layer's attention."""


def ablate(workload: Workload, config: PureKVConfig) -> Ablation:
    """Run one prefill with timers inside."""
    with TimedRun(config, workload.model) as run:
        whole = phases.prefill(workload, DynamicCache())
        ms, parts = run.parts()
        # The tail that runs again grows the cache behind the last eviction.
        return Ablation(ms, parts, whole, max(run.kv_bytes_peak, whole.kv_bytes or 0))


class TimedRun(Run):
    """A run that knows where its own time goes. For one prefill."""

    _looks_on = True

    def __init__(self, config: PureKVConfig, model: PreTrainedModel) -> None:
        super().__init__(config, model)
        self._laps = Laps(model.device)
        self.kv_bytes_peak = 0

    def parts(self) -> tuple[float, dict[str, float]]:
        """Milliseconds of the run's own code, and those of each of `PARTS`."""
        ms = self._laps.ms
        parts = {name: ms.get(name, 0.0) for name in PARTS}
        scoring = parts["scoring_source"] + parts["scoring_elsewhere"]
        parts["selection"] = ms.get(_SELECT, 0.0) - scoring - parts["certificate"]
        parts["other"] = ms[_TOTAL] - sum(parts.values())
        return ms[_TOTAL], parts

    def _before_model(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        with self._laps(_TOTAL), self._laps("setup"):
            super()._before_model(module, args, kwargs)
        if self._prefill is None:
            return
        prefill, scoring = self._prefill, self._prefill.scoring
        score = scoring.score

        def timed_score(layer: LayerInputs) -> Tensor:
            observes = self._scorer.observes(layer.layer_idx)
            with self._laps("scoring_source" if observes else "scoring_elsewhere"):
                return score(layer)

        scoring.score = timed_score  # type: ignore[method-assign]
        prefill.select = self._laps.around(_SELECT, prefill.select)
        prefill._certify = self._laps.around(  # type: ignore[method-assign]
            "certificate", prefill._certify
        )

    def _drop_before_layers(self, prefill: Prefill, kwargs: dict[str, Any]) -> None:
        with self._laps(_TOTAL), self._laps("dropping"):
            super()._drop_before_layers(prefill, kwargs)

    def _before_layer(
        self, layer_idx: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self._prefill is None:  # the tail that runs again, inside its own lap
            return super()._before_layer(layer_idx, module, args, kwargs)
        with self._laps(_TOTAL), self._laps("dropping"):
            return super()._before_layer(layer_idx, module, args, kwargs)

    def _evict(self, prefill: Prefill, attended: Attended) -> Any:
        assert self._cache is not None
        self.kv_bytes_peak = max(self.kv_bytes_peak, cache_bytes(self._cache))
        layer = self._cache.layers[attended.layer_idx]
        layer.evict = self._laps.around("compaction", layer.evict)
        with self._laps(_TOTAL):
            selection = super()._evict(prefill, attended)
        del layer.evict  # a cycle would keep the layer's tensors until garbage is collected
        return selection

    def _after_language_model(
        self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any
    ) -> Any:
        if self._prefill is None:  # the tail that runs again, inside its own lap
            return super()._after_language_model(module, args, kwargs, output)
        with self._laps(_TOTAL):
            return super()._after_language_model(module, args, kwargs, output)

    def _rerun_tail(
        self, module: nn.Module, kwargs: dict[str, Any], tail: Tensor, output: Any
    ) -> None:
        with self._laps("tail_rerun"):
            super()._rerun_tail(module, kwargs, tail, output)
