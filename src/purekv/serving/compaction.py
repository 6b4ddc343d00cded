"""One layer's choice: what of a prompt stays, given its queries, keys and values."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from purekv.allocation import ALLOCATIONS
from purekv.layout import Layout, VisualSpan
from purekv.scoring import LayerInputs, Scorer
from purekv.scoring.clie import CLIE
from purekv.selection import Selection, Selector
from purekv.serving.hole import Hole
from purekv.serving.requests import Request
from purekv.window import Window, observed_attention


@dataclass
class WindowInputs(LayerInputs):
    """A layer's tensors where queries are those of the window only, in its order."""

    @cached_property
    def window_attention(self) -> Tensor:
        return observed_attention(
            self.query, self.key, self.scaling, self.window, self.layout.is_token
        )


@dataclass
class Compaction:
    """What the layers of one step share of one prompt that ends in it."""

    request: Request
    hole: Hole
    window: int
    """The prompt's last tokens, which observe and stay."""
    sinks: int
    """The prompt's first tokens, which stay."""
    observed: Tensor | None = field(default=None, repr=False)
    """What the last source layer measured, for the layers above it."""
    _tools: dict[tuple[torch.device, int], "_Tools"] = field(default_factory=dict, repr=False)

    @property
    def window_start(self) -> int:
        """Position of the first observing token."""
        tail = self.request.tail
        return tail if 0 < tail < self.hole.tokens else self.hole.tokens - self.window

    @cached_property
    def layout(self) -> Layout:
        spans = [VisualSpan(start, (1, 1, size), "video") for start, size in self.request.spans]
        return Layout.build(torch.ones(1, self.hole.tokens, dtype=torch.bool), [spans])

    @cached_property
    def _window(self) -> Window:
        position = torch.arange(self.window_start, self.hole.tokens)[None]
        return Window(position, torch.ones_like(position, dtype=torch.bool))

    @cached_property
    def _protected(self) -> Tensor:
        """bool [1, N]: text between images or videos, if it leaves them a place; else sinks and
        window, which every budget has room for."""
        is_text = self.layout.is_text
        if self.request.spans and int(is_text.sum()) < self.hole.kept:
            return is_text
        ends = torch.zeros_like(is_text)
        ends[:, : self.sinks] = True
        ends[:, self.hole.tokens - self.window :] = True
        return ends

    def keep(
        self,
        scorer: Scorer,
        layer_idx: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float,
        average: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """Positions that stay, int64 [num_key_value_heads, B], ascending.

        Args:
            scorer: of the run.
            layer_idx: of the layer; they come in order.
            query: [W, num_attention_heads, D], the window's, rotated.
            key, value: [N, num_key_value_heads, D], keys rotated.
            scaling: factor on the dot products.
            average: over the parts of a layer that other workers hold, for what all heads share.
        """
        tools = self._tools_on(key.device, key.shape[1])
        query, key, value = (states.transpose(0, 1)[None] for states in (query, key, value))
        layer = WindowInputs(
            layer_idx,
            query,
            key,
            value,
            scaling,
            layout=tools.layout,
            window=tools.window,
            rotation=None,  # type: ignore[arg-type]  # no scorer here undoes it
        )
        if scorer.observes(layer_idx):
            self.observed = scorer.observe(layer)
            if isinstance(scorer, CLIE):  # one importance for all heads
                self.observed = average(self.observed)
        scores = scorer.score(layer, self.observed).expand(1, key.shape[1], -1)
        selection = tools.selector.select(0, scores)
        assert isinstance(selection, Selection)
        return selection.index[0]

    def _tools_on(self, device: torch.device, heads: int) -> "_Tools":
        """Made once for all layers, as moving them to a GPU waits for it."""
        if (device, heads) not in self._tools:
            protected = self._protected
            quota = [self.hole.kept - int(protected.sum())]
            selector = Selector(ALLOCATIONS["uniform"], ~protected, protected, quota, 1, heads)
            moved = self.layout.to(device), self._window.to(device)
            self._tools[device, heads] = _Tools(*moved, selector)
        return self._tools[device, heads]


@dataclass(frozen=True)
class _Tools:
    """What a prompt's length and media alone decide."""

    layout: Layout
    window: Window
    selector: Selector
