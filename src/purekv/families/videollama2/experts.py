"""Mixtral's experts: one matrix each in checkpoints, one tensor for all in transformers 5."""

import re
from collections.abc import Callable
from typing import TypeAlias

from torch import Tensor

Place: TypeAlias = Callable[[Tensor], Tensor]
"""The part of a parameter that a tensor of the checkpoint is."""

_EXPERT = re.compile(r"(.+)\.block_sparse_moe\.experts\.(\d+)\.w([123])\.weight")


def expert_place(name: str) -> tuple[str, Place]:
    """A parameter's name in transformers, and which part of it the tensor of that name is.

    `experts.gate_up_proj` [experts, 2 * intermediate, hidden] holds w1 over w3, and
    `experts.down_proj` [experts, hidden, intermediate] w2.
    """
    match = _EXPERT.fullmatch(name)
    if match is None:
        return name.replace(".block_sparse_moe.gate.", ".mlp.gate."), lambda parameter: parameter
    layer, expert, matrix = match[1], int(match[2]), int(match[3])
    if matrix == 2:
        return f"{layer}.mlp.experts.down_proj", lambda parameter: parameter[expert]
    half = matrix // 2  # of w1 and w3: 0 and 1
    return f"{layer}.mlp.experts.gate_up_proj", lambda parameter: parameter[expert].chunk(2)[half]
