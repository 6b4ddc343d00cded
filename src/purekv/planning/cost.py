"""How long a prefill takes, by the tokens that each layer computes and how it attends to them."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class CostModel:
    """Milliseconds of a language model's prefill, a sum over its layers.

    The defaults are those of Qwen2.5-VL-7B's shapes on one H200 in bfloat16, fitted to the table in
    docs/planner.md (16k to 128k tokens, within 12%). For another model or device, time a dense and
    a sparse layer at two lengths and write the constants down.
    """

    linear: float = 9.0e-4
    """Of a layer without its attention, per token that it computes."""
    dense: float = 1.2e-8
    """Of dense causal attention, per squared token."""
    sparse: float = 1.75e-4
    """Of sparse attention (own frame, anchors, its passes), per token."""
    tile: float = 7.5e-11
    """Of what tiles above 2 add to it, per squared token and tile area above 4."""
    score: float = 2.0e-5
    """Of a source layer's attention rows (64 queries), per token."""

    def attention(self, tokens: float, tile: int) -> float:
        """ms of one layer's attention; a tile of 0 is dense."""
        dense = self.dense * tokens**2
        if tile == 0:
            return dense
        return min(dense, self.sparse * tokens + self.tile * max(0, tile**2 - 4) * tokens**2)

    def prefill(self, tokens: Sequence[float], tiles: Sequence[int], sources: int = 0) -> float:
        """ms of a prefill.

        Args:
            tokens: that each layer computes.
            tiles: of each layer; 0 is dense.
            sources: layers that compute attention rows for scores.
        """
        layers = zip(tokens, tiles, strict=True)
        each = (self.linear * n + self.attention(n, tile) for n, tile in layers)
        return sum(each) + sources * self.score * max(tokens)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
