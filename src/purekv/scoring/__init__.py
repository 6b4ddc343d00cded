"""Importance of cache entries: one scorer a file, one line here.

A scorer gets one layer's tensors and answers float32 [B, num_key_value_heads, S], higher = keep.
Text is protected and padding removed by `purekv.selection`, not by scorers.
"""

from collections.abc import Callable

from purekv.scoring.attention import Attention
from purekv.scoring.base import Attended, LayerInputs, Scorer
from purekv.scoring.clie import CLIE
from purekv.scoring.clie_rare import CLIERare
from purekv.scoring.expected_attention import ExpectedAttention
from purekv.scoring.frame_difference import FrameDifference
from purekv.scoring.h2o import H2O
from purekv.scoring.infinipot_v import InfiniPotV
from purekv.scoring.key_diff import KeyDiff
from purekv.scoring.random import Random
from purekv.scoring.snapkv import SnapKV
from purekv.scoring.streaming import Streaming
from purekv.scoring.value_norm import ValueNorm
from purekv.scoring.vatp import VATP

SourceLayers = tuple[int, ...] | str

SCORERS: dict[str, Callable[[SourceLayers, int], Scorer]] = {
    "clie": CLIE.for_model,
    "clie_rare": CLIERare.for_model,
    "attention": Attention.for_model,
    "snapkv": lambda source_layers, num_layers: SnapKV(),
    "h2o": lambda source_layers, num_layers: H2O(),
    "streaming": lambda source_layers, num_layers: Streaming(),
    "key_diff": lambda source_layers, num_layers: KeyDiff(),
    "vatp": lambda source_layers, num_layers: VATP(),
    "expected_attention": lambda source_layers, num_layers: ExpectedAttention(),
    "infinipot_v": lambda source_layers, num_layers: InfiniPotV(num_layers),
    "frame_difference": lambda source_layers, num_layers: FrameDifference(),
    "value_norm": lambda source_layers, num_layers: ValueNorm(),
    "random": lambda source_layers, num_layers: Random(),
}

# Of these, who can say which tokens no further layer need compute: behind their source layers, or
# before the first one.
DROPPING = ("clie", "attention", "frame_difference")
BEFORE_LAYERS = ("frame_difference",)
# Who needs every token of a frame.
WHOLE_FRAMES = ("infinipot_v",)
# Who needs queries before their rotation.
UNROTATING = ("expected_attention",)

# Of these, whose scores are attention times value norm: what a layer's output loses with an entry.
IN_OUTPUT_UNITS = ("clie",)


def make_scorer(name: str, source_layers: SourceLayers, num_layers: int) -> Scorer:
    """The scorer of that name, for a model of `num_layers` layers.

    Raises:
        PureKVError: a source layer that the model does not have.
    """
    return SCORERS[name](source_layers, num_layers)


__all__ = [
    "BEFORE_LAYERS",
    "DROPPING",
    "IN_OUTPUT_UNITS",
    "SCORERS",
    "UNROTATING",
    "Attended",
    "LayerInputs",
    "Scorer",
    "make_scorer",
]
