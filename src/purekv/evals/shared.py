"""One prefill, many methods: what makes evaluation affordable on a small machine."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from purekv.attach import Run
from purekv.budget import keep_counts
from purekv.cache import make_evicting
from purekv.config import PureKVConfig
from purekv.errors import PureKVError
from purekv.prefill import Prefill
from purekv.scoring import make_scorer


class SharedPrefill(Run):
    """A run whose own cache stays whole, and which fills one compressed cache for each config.

    All configs evict after a layer's attention, so they see the same queries, keys and values.
    Their caches end before the text behind the last visual token: `generate` with the same ids and
    such a cache runs that text on it, which is `first_token="compressed"`. Batches of one.

        with SharedPrefill(configs, model) as run:
            full = model.generate(**inputs)
            ours = [model.generate(**ids, past_key_values=cache) for cache in run.caches]
    """

    def __init__(self, configs: Sequence[PureKVConfig], model: PreTrainedModel) -> None:
        super().__init__(PureKVConfig(budget=1.0), model)
        self._configs = [replace(config, first_token="compressed") for config in configs]
        self._scorers = [
            make_scorer(config.scorer, config.source_layers, self._num_layers) for config in configs
        ]
        self._prefills: list[Prefill] = []
        self.caches: list[Cache] = []
        """One for each config, of the last prompt."""

    def _before_model(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        super()._before_model(module, args, kwargs)
        if self._prefill is None:
            return
        layout = self._prefill.layout
        if len(layout.spans) != 1:
            raise PureKVError("a shared prefill takes one prompt at a time; use batches of one")
        self.caches, self._prefills = [], []
        for config, scorer in zip(self._configs, self._scorers, strict=True):
            quota = keep_counts(config.budget, layout)
            heads = self._language.config.num_key_value_heads
            self._prefills.append(Prefill(config, scorer, layout, quota, heads))
            cache = DynamicCache()
            make_evicting(cache, self._num_layers)
            self.caches.append(cache)

    def _evict(
        self,
        prefill: Prefill,
        layer_idx: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float,
    ) -> None:
        super()._evict(prefill, layer_idx, query, key, value, scaling)
        for branch, cache in zip(self._prefills, self.caches, strict=True):
            selection = branch.select(layer_idx, query, key, value, scaling)
            layer = cache.layers[layer_idx]
            layer.lazy_initialization(key, value)
            layer.evict(key, value, selection, branch.seen)
