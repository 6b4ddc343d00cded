"""Attention of one token to heads that keep different numbers of entries, without padding them."""

from importlib.util import find_spec

import torch
from torch import Tensor

from purekv.ops.ragged_decode.reference import Segments
from purekv.ops.ragged_decode.reference import ragged_decode as reference

__all__ = ["Segments", "has_kernel", "ragged_decode", "reference"]


def has_kernel(device: torch.device) -> bool:
    """Whether the kernel runs there."""
    return device.type == "cuda" and find_spec("triton") is not None


def ragged_decode(query: Tensor, segments: Segments, scale: float) -> Tensor:
    """The kernel's answer; see the reference. Triton is imported here, where it is needed."""
    from purekv.ops.ragged_decode.kernel import ragged_decode as kernel

    return kernel(query, segments, scale)
