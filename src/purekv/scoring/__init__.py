"""Importance of cache entries: one scorer a file, one line here.

A scorer gets one layer's tensors and answers float32 [B, num_key_value_heads, S], higher = keep.
Text is protected and padding removed by `purekv.selection`, not by scorers.
"""

from collections.abc import Callable

from purekv.scoring.base import LayerInputs, Scorer
from purekv.scoring.clie import CLIE
from purekv.scoring.random import Random
from purekv.scoring.snapkv import SnapKV
from purekv.scoring.value_norm import ValueNorm

SourceLayers = tuple[int, ...] | str

SCORERS: dict[str, Callable[[SourceLayers, int], Scorer]] = {
    "clie": CLIE.for_model,
    "snapkv": lambda source_layers, num_layers: SnapKV(),
    "value_norm": lambda source_layers, num_layers: ValueNorm(),
    "random": lambda source_layers, num_layers: Random(),
}


def make_scorer(name: str, source_layers: SourceLayers, num_layers: int) -> Scorer:
    """The scorer of that name, for a model of `num_layers` layers.

    Raises:
        PureKVError: a source layer that the model does not have.
    """
    return SCORERS[name](source_layers, num_layers)


__all__ = ["SCORERS", "LayerInputs", "Scorer", "make_scorer"]
