"""One prefill, many methods and budgets: what makes evaluation affordable."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from purekv.allocation import Allocation, make_allocation
from purekv.attach import Run
from purekv.budget import keep_counts
from purekv.cache import EvictingLayer, make_evicting
from purekv.config import PureKVConfig
from purekv.errors import PureKVError
from purekv.evals.positions import TextPositions, first_positions
from purekv.fit import refuse_ragged_flash
from purekv.layout import Layout
from purekv.prefill import Prefill, Scoring
from purekv.ragged import RaggedLayer, settle
from purekv.rotation import Rotation
from purekv.scoring import Attended, make_scorer
from purekv.selection import Selector
from purekv.upstream import CACHE, cache_of
from purekv.window import Window, observation_window


@dataclass(frozen=True)
class Stack:
    """Caches of several configs on top of one another: row `m * B + b` is sample b under
    `configs[members[m]]`. They hold the prompt up to its last token, which is still to be run."""

    members: tuple[int | None, ...]
    """Numbers of configs; None is the full cache."""
    cache: Cache
    text: TextPositions
    """Of its rows."""


class SharedPrefill(Run):
    """A run whose own cache stays whole, and which fills one compressed cache for each config.

    All configs evict after a layer's attention, so they see the same queries, keys and values:
    each scorer scores a layer once, whatever the budgets, and configs of one budget and allocation
    are selected, stored and asked together. All text behind the last visual token is computed again
    on the compressed caches, which is `first_token="compressed"`.

        with SharedPrefill(configs, model) as run:
            for stack in run.stacks(inputs):
                answers = answer_samples(model, processor, batch, stack)

    Args:
        configs: what to compare; their `first_token` is not looked at.
        rows_at_once: a stack holds no more rows than this, or a single config.
    """

    _looks_on = True

    def __init__(
        self, configs: Sequence[PureKVConfig], model: PreTrainedModel, rows_at_once: int = 32
    ) -> None:
        super().__init__(PureKVConfig(budget=1.0), model)
        if self._slides:
            raise PureKVError(
                "models with sliding-window layers cannot be evaluated from one shared prefill, as "
                "their caches cannot go back; compare runs of PureKV(config)(model)"
            )
        for config in configs:
            refuse_ragged_flash(config.allocation, self._backend.name)
        for config in configs:
            if config.scope != "visual":
                raise PureKVError(
                    f"scope={config.scope!r} cannot be evaluated from one shared prefill; use "
                    'scope="visual", or compare runs of PureKV(config)(model)'
                )
        self._configs = list(configs)
        self._rows_at_once = rows_at_once
        self._branches: _Branches | None = None

    def stacks(self, inputs: Mapping[str, Any]) -> list[Stack]:
        """Prefill a batch, padded on the left: the full cache, then those of the configs.

        Raises:
            PureKVError: a row without pixels, without text behind them, or padded on the right.
        """
        with first_positions(self._model) as positions:
            output = self._model.generate(
                **inputs, max_new_tokens=1, do_sample=False, return_dict_in_generate=True
            )
        full = cache_of(output)
        full.crop(-1)
        for layer in full.layers:
            layer.prompt_entries = layer.physical_length
        branches, self._branches = self._branches, None
        assert branches is not None
        text = TextPositions.of_prompt(self._model, positions[0])
        caches = [((None,), full), *zip(branches.members, branches.caches, strict=True)]
        return [Stack(members, cache, text.repeat(len(members))) for members, cache in caches]

    def _before_model(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        super()._before_model(module, args, kwargs)
        if self._prefill is not None:
            self._branches = _Branches(
                self._configs,
                self._prefill.layout,
                self._num_layers,
                self._num_heads,
                self._rows_at_once,
            )

    def _evict(self, prefill: Prefill, attended: Attended) -> Any:
        selection = super()._evict(prefill, attended)
        if self._branches is not None:
            assert prefill.rotation is not None
            self._branches.fill(attended, prefill.rotation)
        return selection

    def _after_language_model(
        self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any
    ) -> Any:
        is_prefill = self._prefill is not None
        output = super()._after_language_model(module, args, kwargs, output)
        if is_prefill and self._branches is not None:
            self._finish(module, kwargs, self._branches)
        return output

    def _finish(self, module: nn.Module, kwargs: dict[str, Any], branches: "_Branches") -> None:
        """Run the text behind the last visual token on each stack, but for the last token."""
        tail = branches.tail[:, :-1]
        length = tail.shape[1]
        embeds, position_ids = kwargs["inputs_embeds"], kwargs.get("position_ids")
        for members, cache in zip(branches.members, branches.caches, strict=True):
            copies = len(members)
            settle(cache.layers)
            stacked = {
                **kwargs,
                "inputs_embeds": embeds[:, -1 - length :].repeat(copies, 1, 1),
                CACHE: cache,
                **dict.fromkeys(set(self._family.full_length_arguments) & set(kwargs)),
            }
            if position_ids is not None:  # [B, S], or [3 or 4, B, S] for M-RoPE
                newest = position_ids[..., -1 - length :]
                stacked["position_ids"] = torch.cat([newest] * copies, dim=-2)
            if length:
                self._run_again(module, stacked, slice(-1), tail.repeat(copies, 1))
            for layer in cache.layers:
                layer.prompt_entries = layer.physical_length


class _Branches:
    """The compressed caches of one prompt while its layers go by."""

    def __init__(
        self,
        configs: Sequence[PureKVConfig],
        layout: Layout,
        num_layers: int,
        num_heads: int,
        rows_at_once: int,
    ) -> None:
        self.tail = layout.newest_tail
        """bool [B, n], as `Prefill.tail`."""
        batch, seq_len = layout.is_token.shape
        if not self.tail[:, -1].all():
            raise PureKVError(
                "every prompt of a shared prefill needs images or videos and text behind them, "
                "and is padded on the left"
            )
        self._seen = seq_len - self.tail.shape[1]
        self._layout = layout
        self._windows: dict[int | str, Window] = {
            config.window: observation_window(layout, config.window) for config in configs
        }
        # One entry for each way to score, whatever the budgets; configs point to theirs.
        ways = [(config.window, config.scorer, config.source_layers) for config in configs]
        self._scorings = {
            way: Scoring(make_scorer(way[1], way[2], num_layers)) for way in dict.fromkeys(ways)
        }
        places = {way: place for place, way in enumerate(self._scorings)}

        alike: dict[tuple[float | int, Allocation], list[int]] = {}
        for number, config in enumerate(configs):
            allocation = make_allocation(config.allocation, config.layer_shares)
            alike.setdefault((config.budget, allocation), []).append(number)
        most = max(1, rows_at_once // batch)
        self.members: list[tuple[int, ...]] = []
        self.caches: list[Cache] = []
        self._ways: list[list[int]] = []
        self._selectors: list[Selector] = []
        protected = layout.is_text & ~layout.is_tail
        for (budget, allocation), numbers in alike.items():
            quota = keep_counts(budget, layout)
            layer_class = RaggedLayer if allocation.ragged else EvictingLayer
            for start in range(0, len(numbers), most):
                members = tuple(numbers[start : start + most])
                copies = len(members)
                cache = DynamicCache()
                make_evicting(cache, num_layers, layer_class)
                self.members.append(members)
                self.caches.append(cache)
                self._ways.append([places[ways[number]] for number in members])
                self._selectors.append(
                    Selector(
                        allocation,
                        layout.is_visual.repeat(copies, 1),
                        protected.repeat(copies, 1),
                        quota * copies,
                        num_layers,
                        num_heads,
                    )
                )

    @torch.no_grad()
    def fill(self, attended: Attended, rotation: Rotation) -> None:
        """Put one layer's entries, as chosen by each config, into the stacked caches."""
        if not self.members:
            return
        layer_idx, key, value = attended.layer_idx, attended.key, attended.value
        self._to(key.device)
        rotation = rotation.to(key.device)
        inputs = {
            name: attended.for_scorers(self._layout, window, rotation)
            for name, window in self._windows.items()
        }
        scores = torch.stack(
            [scoring.score(inputs[window]) for (window, *_), scoring in self._scorings.items()]
        )
        copied: dict[int, tuple[Tensor, Tensor]] = {}
        for cache, ways, selector in zip(self.caches, self._ways, self._selectors, strict=True):
            copies = len(ways)
            if copies not in copied:
                copied[copies] = key.repeat(copies, 1, 1, 1), value.repeat(copies, 1, 1, 1)
            selection = selector.select(layer_idx, scores[ways].flatten(0, 1))
            layer = cache.layers[layer_idx]
            layer.lazy_initialization(key, value)
            layer.evict(*copied[copies], selection, self._seen)

    def _to(self, device: torch.device) -> None:
        if self._layout.is_token.device != device:
            self._layout = self._layout.to(device)
            self._windows = {name: window.to(device) for name, window in self._windows.items()}
