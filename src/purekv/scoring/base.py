"""What a scorer sees and what it answers."""

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from purekv.layout import Layout
from purekv.parallel import WHOLE, HeadShards
from purekv.rotation import Rotation
from purekv.scoring.accumulated import accumulated_attention
from purekv.window import Window, window_attention


@dataclass  # not frozen: every layer makes one, and on short prompts the GPU waits for the host
class Attended:
    """What one layer's prefill attention just ran on. B rows, S positions that the layer computes,
    padding included."""

    layer_idx: int
    query: Tensor
    """[B, num_attention_heads, S, D], rotated."""
    key: Tensor
    """[B, num_key_value_heads, S, D], rotated."""
    value: Tensor
    """[B, num_key_value_heads, S, D]."""
    scaling: float
    shards: HeadShards = WHOLE
    """Whose heads these are, under tensor parallelism."""

    def for_scorers(self, layout: Layout, window: Window, rotation: Rotation) -> "LayerInputs":
        return LayerInputs(**vars(self), layout=layout, window=window, rotation=rotation)


@dataclass(kw_only=True)
class LayerInputs(Attended):
    """That, and what a scorer needs to know of its positions."""

    layout: Layout
    """On the layer's device."""
    window: Window
    """On the layer's device."""
    rotation: Rotation
    """Of query and key; on the layer's device."""

    # Cached, since scorers of one evaluation share the inputs of a layer.

    @cached_property
    def window_attention(self) -> Tensor:
        """float32 [B, num_key_value_heads, groups, S]; see `purekv.window.window_attention`."""
        return window_attention(
            self.query, self.key, self.scaling, self.window, self.layout.is_token
        )

    @cached_property
    def accumulated_attention(self) -> Tensor:
        """float32 [B, num_key_value_heads, groups, S]; see `purekv.scoring.accumulated`."""
        return accumulated_attention(self.query, self.key, self.scaling, self.layout.is_token)

    @cached_property
    def value_norm(self) -> Tensor:
        """L2 norm of each value vector, float32 [B, num_key_value_heads, S]."""
        wide = torch.promote_types(self.value.dtype, torch.float32)
        return torch.linalg.vector_norm(self.value, dim=-1, dtype=wide).float()


class Scorer(Protocol):
    """Importance of cache entries. Holds hyperparameters only, nothing of a request."""

    def observes(self, layer_idx: int) -> bool:
        """Whether `observe` runs at this layer."""
        ...

    def observe(self, layer: LayerInputs) -> Tensor:
        """What this layer and the ones after it score with, until the next observation."""
        ...

    def score(self, layer: LayerInputs, observed: Tensor | None) -> Tensor:
        """Importance, float32, broadcastable to [B, num_key_value_heads, S]; higher is kept."""
        ...
