"""Which plans for speed a model can be tried with."""

import pytest

from purekv import PureKVError
from purekv.planning.calibrate import _fitting
from tests.families.zoo import ZOO

PRUNED = {"budget": 0.4, "scorer": "frame_difference", "evict": "drop"}
DROPPED = {"budget": 0.4, "scorer": "clie", "evict": "drop", "source_layers": [2]}


def test_pixels_that_come_again_behind_layers_are_not_pruned():
    model = ZOO["qwen3_vl"].model()
    assert _fitting(model, [(PRUNED, 1.0), (DROPPED, 2.0)]) == [(DROPPED, 2.0)]


def test_a_model_that_drops_nothing_says_so():
    with pytest.raises(PureKVError, match="evict"):
        _fitting(ZOO["gemma3"].model(), [(PRUNED, 1.0), (DROPPED, 2.0)])
