"""CLIE for one part of the places, keys unlike the others for the rest."""

from dataclasses import dataclass

from torch import Tensor

from purekv.ranking import places_of
from purekv.scoring.base import LayerInputs
from purekv.scoring.clie import CLIE
from purekv.scoring.key_diff import KeyDiff


@dataclass(frozen=True)
class CLIERare:
    """What the question looks at, and what later questions may look for.

    A question's attention says nothing of the next one; rare keys (KeyDiff) find what stands out,
    whoever asks. Visual tokens are ranked by each score (0 is best; a row and head by itself) and
    score `-min(rank_CLIE / (1 - rare), rank_rare / rare)`: for any budget the tokens kept are the
    best of both lists, in that proportion. Ours; docs/planner.md has what it gains.
    """

    clie: CLIE
    rare: float = 0.5
    """Part of the places that go to rare keys."""

    @classmethod
    def for_model(cls, source_layers: tuple[int, ...] | str, num_layers: int) -> "CLIERare":
        return cls(CLIE.for_model(source_layers, num_layers))

    @property
    def source_layers(self) -> tuple[int, ...]:
        return self.clie.source_layers

    def observes(self, layer_idx: int) -> bool:
        return self.clie.observes(layer_idx)

    def observe(self, layer: LayerInputs) -> Tensor:
        return self.clie.observe(layer)

    def score(self, layer: LayerInputs, observed: Tensor | None) -> Tensor:
        asked = places_of(self.clie.score(layer, observed), layer.layout.is_visual)
        rare = places_of(KeyDiff().score(layer, None), layer.layout.is_visual)
        return -(asked / (1 - self.rare)).minimum(rare / self.rare)
