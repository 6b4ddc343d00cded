"""One prefill being compressed: what is shared between its layers."""

from collections.abc import Sequence

import torch
from torch import Tensor

from purekv.allocation import Allocation
from purekv.config import PureKVConfig
from purekv.errors import PureKVError
from purekv.layout import Layout
from purekv.rotation import Rotation
from purekv.scoring import LayerInputs, Scorer
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


class Prefill:
    """Scores and selects, layer after layer, for one prompt.

    Args:
        config: the run's.
        scorer: the config's, for this model.
        allocation: the config's.
        layout: of the prompt, on the CPU.
        quota: visual entries that each (layer, KV head) keeps on average, per row.
        num_layers: of the model.
        num_key_value_heads: of every layer.

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
        num_layers: int,
        num_key_value_heads: int,
    ) -> None:
        self.layout = layout
        self.quota = tuple(quota)
        self.evicts = self.quota != layout.visual_tokens
        """False if the budget keeps everything; then nothing at all is changed."""
        self.scoring = Scoring(scorer)
        self.kv_bytes_full = 0
        self.rotation: Rotation | None = None
        """Of the prompt; known once its layers run."""

        protected = layout.is_text
        self.tail: Tensor | None = None
        """bool [B, n]; the newest n positions, True at text that runs again on the compressed
        cache. None if nothing does."""
        if self.evicts and config.first_token == "compressed":
            for row, visual in enumerate(layout.visual_tokens):
                if visual and not layout.is_tail[row].any():
                    raise PureKVError(
                        f"row {row} of the prompt has no text after its last visual token to "
                        'compute again; put the question behind it, or use first_token="exact"'
                    )
            protected = protected & ~layout.is_tail
            self.tail = layout.newest_tail
        self._window = observation_window(layout, config.window)
        self._selector = Selector(
            allocation, layout.is_visual, protected, self.quota, num_layers, num_key_value_heads
        )
        self._on_device: dict[torch.device, tuple[Layout, Window, Rotation]] = {}

    @property
    def seen(self) -> int:
        """Positions that the cache has seen once its layers are evicted."""
        seq_len = self.layout.is_token.shape[1]
        return seq_len if self.tail is None else seq_len - self.tail.shape[1]

    @torch.no_grad()
    def select(
        self, layer_idx: int, query: Tensor, key: Tensor, value: Tensor, scaling: float
    ) -> Selection | RaggedSelection:
        """Score one layer and choose its entries.

        Args:
            query: [B, num_attention_heads, S, D], rotated.
            key, value: [B, num_key_value_heads, S, D].
        """
        device = value.device
        assert self.rotation is not None
        if device not in self._on_device:
            self._on_device[device] = (
                self.layout.to(device),
                self._window.to(device),
                self.rotation.to(device),
            )
        layout, window, rotation = self._on_device[device]
        layer = LayerInputs(layer_idx, query, key, value, scaling, layout, window, rotation)
        return self._selector.select(layer_idx, self.scoring.score(layer))
