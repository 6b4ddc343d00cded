"""Importance of cache entries: one scorer a file, one line here.

A scorer gets one layer's tensors and answers float32 [B, num_key_value_heads, S], higher = keep.
Text is protected and padding removed by `purekv.selection`, not by scorers.
"""

from collections.abc import Callable

from purekv.config import PureKVConfig
from purekv.scoring.base import LayerInputs, Scorer
from purekv.scoring.clie import CLIE
from purekv.scoring.random import Random
from purekv.scoring.snapkv import SnapKV
from purekv.scoring.value_norm import ValueNorm

SCORERS: dict[str, Callable[[PureKVConfig, int], Scorer]] = {
    "clie": lambda config, num_layers: CLIE.from_config(config.source_layers, num_layers),
    "snapkv": lambda config, num_layers: SnapKV(),
    "value_norm": lambda config, num_layers: ValueNorm(),
    "random": lambda config, num_layers: Random(),
}


def make_scorer(config: PureKVConfig, num_layers: int) -> Scorer:
    """The scorer that a config names, for a model of `num_layers` layers."""
    return SCORERS[config.scorer](config, num_layers)


__all__ = ["SCORERS", "LayerInputs", "Scorer", "make_scorer"]
