"""One prefill being compressed: what is shared between its layers."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from purekv.allocation import Allocation
from purekv.allocation.uniform import Uniform
from purekv.attention.pattern import Pattern, row_patterns
from purekv.certificate import Measured, Measures, measure
from purekv.config import PureKVConfig
from purekv.dropping import Kept, stage_quotas
from purekv.errors import PureKVError
from purekv.layout import Layout
from purekv.roles import LayerRoles
from purekv.rotation import Rotation
from purekv.scoring import IN_OUTPUT_UNITS, Attended, LayerInputs, Scorer
from purekv.selection import RaggedSelection, Selection, Selector
from purekv.window import Window, observation_window


class Scoring:
    """One scorer on its way through the layers of one prompt."""

    def __init__(self, scorer: Scorer) -> None:
        self._scorer = scorer
        self._observed: Tensor | None = None
        self.source_layers: list[int] = []
        """Layers that were observed so far."""

    def score(self, layer: LayerInputs) -> Tensor:
        """Float32 [B, num_key_value_heads, S]; layers come in ascending order."""
        if self._scorer.observes(layer.layer_idx):
            self._observed = self._scorer.observe(layer)
            self.source_layers.append(layer.layer_idx)
        return self._scorer.score(layer, self._observed).expand(layer.value.shape[:3])

    def keep(self, fewer: Kept) -> None:
        """Go on with fewer tokens."""
        if self._observed is not None:  # [B, heads, S]
            self._observed = fewer.take(self._observed.transpose(1, 2), 1).transpose(1, 2)


@dataclass
class _Stage:
    """The tokens that layers compute, from one drop to the next. Masks are on the CPU."""

    layout: Layout
    window: Window
    stored: Tensor
    """bool [B, S]; text that the cache keeps."""
    selector: Selector
    settled: bool = False
    """Whether all of its visual tokens are within the quota: nothing is left to choose."""
    on_device: dict[torch.device, tuple[Layout, Window]] = field(default_factory=dict)

    def on(self, device: torch.device) -> tuple[Layout, Window]:
        if device not in self.on_device:
            self.on_device[device] = self.layout.to(device), self.window.to(device)
        return self.on_device[device]


class Prefill:
    """Scores and selects, layer after layer, for one prompt.

    Args:
        config: the run's.
        scorer: the config's, for this model.
        allocation: the config's.
        layout: of the prompt, on the CPU; what it calls visual may be evicted.
        quota: visual entries that each (layer, KV head) keeps on average, per row.
        roles: what each layer does.
        num_key_value_heads: of every layer; this rank's, under tensor parallelism.
        media: where images and videos are, if `layout` does not say.

    Raises:
        PureKVError: a row has nothing to score with, or no text to compute again.
    """

    def __init__(
        self,
        config: PureKVConfig,
        scorer: Scorer,
        allocation: Allocation,
        layout: Layout,
        quota: Sequence[int],
        roles: LayerRoles,
        num_key_value_heads: int,
        media: Layout | None = None,
    ) -> None:
        self.layout = layout
        self.quota = tuple(quota)
        self.evicts = self.quota != layout.visual_tokens
        """False if the budget keeps everything; then nothing at all is changed."""
        self.scoring = Scoring(scorer)
        self.kv_bytes_full = 0
        self.computed: list[int] = []
        """Positions that each layer so far computed."""
        self.rotation: Rotation | None = None
        """Of the prompt; known once its layers run."""
        self.attention: list[str] = []
        """What each layer's attention so far was, as the report has it."""
        self.patterns: dict[int, tuple[Pattern, ...]] = {}
        """Of sparse attention, by the tile, for each row; empty: all are dense."""
        sparse = config.spatiotemporal
        media = media or layout
        most = max(media.visual_tokens, default=0)
        if config.prefill == "spatiotemporal" and most >= sparse.min_tokens:
            for tile in {sparse.tile_of(layer) for layer in roles.evicting} - {0}:
                patterns = row_patterns(media, tile, sparse.anchor_frames, sparse.min_tokens)
                if any(pattern.clips for pattern in patterns):
                    self.patterns[tile] = patterns
        self.changes = self.evicts or bool(self.patterns) or layout.has_padding
        """Whether any layer does more than the model's own attention."""
        self._sparse = sparse
        self._active_layers = roles.active if self.evicts else frozenset()
        self.kept: Kept | None = None
        """Positions that are still computed, of those that the first layer got; None: all."""
        self.pending: Kept | None = None
        """The same, of what the last layer computed: a drop that the next layer's input must
        feel."""
        self.tail: Tensor | None = None
        """bool [B, n]; the newest n positions, True at text that runs again on the compressed
        cache. None if nothing does."""
        self.measured: list[Measured] | None = None
        """Of each layer that had something to choose; None if nobody asked."""
        if config.certificate or config.tolerance is not None:
            self.measured = []
        self._drops: dict[int, list[int]] = {}
        if self.evicts:
            self._prepare_to_evict(config, allocation, roles, num_key_value_heads)

    def _prepare_to_evict(
        self, config: PureKVConfig, allocation: Allocation, roles: LayerRoles, num_heads: int
    ) -> None:
        layout, stored = self.layout, self.layout.is_text
        if config.first_token == "compressed":
            for row, visual in enumerate(layout.visual_tokens):
                if visual and not layout.is_tail[row].any():
                    raise PureKVError(
                        f"row {row} of the prompt has no text after its last visual token to "
                        'compute again; put the question behind it, or use first_token="exact"'
                    )
            stored = stored & ~layout.is_tail
            self.tail = layout.newest_tail
        self._allocation = allocation
        self._place = {layer_idx: place for place, layer_idx in enumerate(roles.evicting)}
        self._num_heads = num_heads
        # With scope="prompt" the text behind the span is the window, whatever its length.
        asked = config.window if config.scope == "visual" else "question"
        window = observation_window(layout, asked)
        self._stage = _Stage(layout, window, stored, self._selector(layout.is_visual, stored))
        self._tolerance = config.tolerance
        self._has_terms = config.scorer in IN_OUTPUT_UNITS
        quotas = stage_quotas(layout.visual_tokens, self.quota, len(roles.dropping))
        self._drops = dict(zip(roles.dropping, quotas, strict=True))

    def attention_of(self, layer_idx: int) -> str:
        """What a layer's attention is to be: "dense", "spatiotemporal" or "kept"."""
        if not self.changes:
            return "dense"
        if layer_idx in self._active_layers:
            return "kept"
        is_sparse = self.patterns and self._sparse.tile_of(layer_idx) in self.patterns
        return "spatiotemporal" if is_sparse else "dense"

    def patterns_of(self, layer_idx: int) -> tuple[Pattern, ...]:
        """Of each row, in a layer that is sparse."""
        return self.patterns[self._sparse.tile_of(layer_idx)]

    def _selector(self, evictable: Tensor, stored: Tensor) -> Selector:
        return Selector(
            self._allocation, evictable, stored, self.quota, len(self._place), self._num_heads
        )

    @property
    def seen(self) -> int:
        """Positions that the cache has seen once its layers are evicted."""
        seq_len = self.layout.is_token.shape[1]
        return seq_len if self.tail is None else seq_len - self.tail.shape[1]

    @torch.no_grad()
    def select(self, attended: Attended) -> Selection | RaggedSelection:
        """Score one layer and choose its entries; behind some layers, also who goes on."""
        layer_idx, value = attended.layer_idx, attended.value
        if self._stage.settled:
            scores = torch.zeros(value.shape[:3], device=value.device)
            return self._stage.selector.select(self._place[layer_idx], scores)
        assert self.rotation is not None
        layout, window = self._stage.on(value.device)
        rotation = self.rotation.to(value.device)
        inputs = attended.for_scorers(layout, window, rotation)
        scores = self.scoring.score(inputs)
        selection = self._stage.selector.select(self._place[layer_idx], scores)
        if self.measured is not None:
            scores, selection = self._certify(inputs, scores, selection)
        if layer_idx in self._drops:
            self.drop(attended.shards.mean(scores), self._drops[layer_idx])
        return selection

    def _certify(
        self, inputs: LayerInputs, scores: Tensor, selection: Selection | RaggedSelection
    ) -> tuple[Tensor, Selection | RaggedSelection]:
        """Measure what a layer's selection costs; where that is above the tolerance and the layer's
        own attention would choose better, let it. Does not wait for the device."""
        place = self._place[inputs.layer_idx]
        found = self._measure(inputs, scores, selection)
        falls_back = torch.zeros_like(found.bound, dtype=torch.bool)
        if self._tolerance is not None:
            own = inputs.window_attention.mean(2) * inputs.value_norm
            better = self._measure(inputs, own, self._stage.selector.select(place, own))
            falls_back = found.relative_bound > self._tolerance
            falls_back &= better.relative_bound < found.relative_bound
            scores = torch.where(falls_back[:, None, None], own, scores)
            selection = self._stage.selector.select(place, scores)
            found = found.where(~falls_back, better)
        assert self.measured is not None
        self.measured.append(Measured(found, falls_back, self._has_terms))
        return scores, selection

    def _measure(
        self, inputs: LayerInputs, scores: Tensor, selection: Selection | RaggedSelection
    ) -> Measures:
        dropped = inputs.layout.is_visual[:, None] & ~selection.mask(scores.shape[-1])
        return measure(inputs, dropped, scores)

    def drop(self, scores: Tensor, quota: Sequence[int]) -> None:
        """Go on with the best visual tokens and all text. Waits for the device once.

        Args:
            scores: float32 [B, S], of the positions that were computed so far.
            quota: visual tokens that go on in each row.
        """
        stage = self._stage
        is_visual, is_text = stage.layout.is_visual, stage.layout.is_text
        chooser = Selector(Uniform(), is_visual, is_text, quota, 1, 1)
        selection = chooser.select(0, scores[:, None])
        assert isinstance(selection, Selection)
        self.pending = Kept.of(selection)
        self.kept = self.pending if self.kept is None else self.kept.of_these(self.pending)
        self.scoring.keep(self.pending)
        fewer = Kept(self.pending.index.cpu(), self.pending.is_token.cpu())

        def taken(mask: Tensor) -> Tensor:
            return fewer.take(mask, 0) & fewer.is_token

        # What is left of a grid has holes, so it is no span any more, and attended to densely.
        self.patterns = {}
        layout = Layout(fewer.is_token, taken(is_visual), tuple(() for _ in quota))
        stored = taken(stage.stored)
        index = fewer.index.masked_fill(~fewer.is_token, -1)
        position = torch.searchsorted(index, stage.window.position)  # its text is all still there
        self._stage = _Stage(
            layout,
            Window(position.clamp(max=fewer.width - 1), stage.window.is_query),
            stored,
            self._selector(layout.is_visual, stored),
            settled=tuple(quota) == self.quota,
        )
