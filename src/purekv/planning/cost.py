"""How long a prefill takes, by the tokens that each layer computes and how it attends to them."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class CostModel:
    """Milliseconds of a language model's prefill, a sum over its layers.

    The defaults are those of Qwen2.5-VL-7B's shapes on one H100 in bfloat16, fitted to
    benchmarks/results/sparse_prefill.json (16k to 128k tokens, dense, sparse and with tokens
    dropped), where they are within 3%; docs/performance.md has the table. For another model or
    device, run that benchmark and write the constants down.
    """

    layer: float = 0.36
    """Of a layer, whatever it computes."""
    linear: float = 8.57e-4
    """Of a layer without its attention, per token that it computes."""
    dense: float = 1.237e-8
    """Of dense causal attention, per squared token."""
    sparse: float = 6.25e-5
    """Of sparse attention within frames and to anchors, per token."""
    tile: float = 5.73e-11
    """Of its temporal pass, per squared token and position of a tile."""
    score: float = 4.5e-5
    """Of a source layer's attention rows (64 queries), per token."""
    drop: float = 2.8e-4
    """Of choosing what goes on behind a layer and gathering it, per token that came there."""

    def attention(self, tokens: float, tile: int) -> float:
        """ms of one layer's attention; a tile of 0 is dense."""
        dense = self.dense * tokens**2
        if tile == 0:
            return dense
        return min(dense, self.sparse * tokens + self.tile * tile**2 * tokens**2)

    def prefill(
        self, tokens: Sequence[float], tiles: Sequence[int], sources: int = 0, drops: int = 0
    ) -> float:
        """ms of a prefill.

        Args:
            tokens: that each layer computes.
            tiles: of each layer; 0 is dense.
            sources: layers that compute attention rows for scores and drop nothing.
            drops: source layers that tokens are dropped behind, of the longest prompt.
        """
        layers = zip(tokens, tiles, strict=True)
        each = (self.layer + self.linear * n + self.attention(n, tile) for n, tile in layers)
        observed = (sources + drops) * self.score + drops * self.drop
        return sum(each) + observed * max(tokens)

    def dropping(
        self, num_layers: int, layer: int, tokens: float, kept: float, tile: int = 0
    ) -> float:
        """ms of a prefill in which `kept` of the tokens go on behind a layer, and the layers up to
        there have that tile."""
        below, above = layer + 1, num_layers - layer - 1
        counts = [tokens] * below + [kept] * above
        return self.prefill(counts, [tile] * below + [0] * above, drops=1)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
