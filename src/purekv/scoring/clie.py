"""Cross-layer importance estimation (PureKV, arXiv:2510.25600)."""

from dataclasses import dataclass

from torch import Tensor

from purekv.errors import PureKVError
from purekv.scoring.base import LayerInputs


def default_source_layers(num_layers: int) -> tuple[int, ...]:
    """Layer 2, then one source per tenth of the depth.

    docs/planner.md: of the embedded model's answers at a 10% budget, one source per fifth keeps
    0.63, one per tenth 0.80, every layer its own 0.85; a source's rows cost 0.04% of a prefill of
    64k tokens.
    """
    return tuple(range(min(2, num_layers - 1), num_layers, max(1, round(num_layers / 10))))


def default_drop_layers(num_layers: int) -> tuple[int, ...]:
    """Layer 2, then one per fifth of the depth, the last fifth left out: behind each source tokens
    are dropped (or, with `evict="active"`, layers see what they keep), and what is dropped late
    saves nothing."""
    step = max(1, round(num_layers / 5))
    first = min(2, num_layers - 1)
    return tuple(range(first, max(first + 1, num_layers - step), step))


@dataclass(frozen=True)
class CLIE:
    """Attention of a lower source layer, weighted by the target layer's own value norms.

    `score[h, g, j] = A_s[j] * ||v[h, g, j]||_2`, where `A_s[j]` is the mean over the window's
    queries and over all query heads of the source layer's softmax. Only source layers compute
    attention rows. Layers below the first source are their own source, so that they can be
    evicted as soon as they are done. The paper's equations are not public; these are ours.
    """

    source_layers: tuple[int, ...]

    @classmethod
    def for_model(cls, source_layers: tuple[int, ...] | str, num_layers: int) -> "CLIE":
        if isinstance(source_layers, str):
            return cls(default_source_layers(num_layers))
        if source_layers[-1] >= num_layers:
            raise PureKVError(
                f"source layer {source_layers[-1]} does not exist; "
                f"the model's layers are 0 to {num_layers - 1}"
            )
        return cls(source_layers)

    def observes(self, layer_idx: int) -> bool:
        return layer_idx < self.source_layers[0] or layer_idx in self.source_layers

    def observe(self, layer: LayerInputs) -> Tensor:
        return layer.shards.mean(layer.window_attention.mean(2))[:, None]

    def score(self, layer: LayerInputs, observed: Tensor | None) -> Tensor:
        assert observed is not None
        return observed.to(layer.value.device) * layer.value_norm
