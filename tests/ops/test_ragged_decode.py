"""The kernel against its reference: in Triton's interpreter, and on a GPU where there is one."""

import sys
from importlib.util import find_spec

import pytest
import torch

from purekv.ops.ragged_decode import Segments, ragged_decode, reference
from tests.processes import run

CASES = {
    # lengths of each head, entries later, query heads a group, D, Dv
    "even": ([[300, 300], [300, 300]], 5, 7, 64, 64),
    "uneven": ([[1, 700, 64]], 3, 2, 16, 32),
    "an empty head": ([[0, 90], [65, 0]], 1, 3, 24, 16),
}


def segments(lengths, later, dim, value_dim, masked, device, dtype):
    """Flat entries in an order of their own, with unused ones between them."""
    generator = torch.Generator().manual_seed(0)
    length = torch.tensor(lengths)
    start = torch.zeros_like(length).flatten()
    place = 3
    for head in torch.randperm(length.numel(), generator=generator).tolist():
        start[head] = place
        place += int(length.flatten()[head]) + 2

    def entries(*shape):
        return torch.randn(*shape, generator=generator).to(device, dtype)

    mask = None
    if masked:
        mask = torch.rand(len(lengths), later, generator=generator) > 0.4
        mask[:, -1] = True
    rows, heads = length.shape
    return Segments(
        entries(place, dim),
        entries(place, value_dim),
        start.view_as(length).to(device),
        length.to(device),
        int(length.max()),
        entries(rows, heads, later + 9, dim)[:, :, :later],  # with room behind
        entries(rows, heads, later + 9, value_dim)[:, :, :later],
        None if mask is None else mask.to(device),
    )


def check(case, masked, device, dtype, close):
    lengths, later, groups, dim, value_dim = CASES[case]
    stored = segments(lengths, later, dim, value_dim, masked, device, dtype)
    shape = len(lengths), groups * len(lengths[0]), 1, dim
    query = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    ours = ragged_decode(query, stored, 0.2)
    torch.testing.assert_close(ours, reference(query, stored, 0.2), rtol=close, atol=close)


@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
def test_the_interpreted_kernel_equals_the_reference():
    code = (
        "from tests.ops.test_ragged_decode import CASES, check\n"
        "import torch\n"
        "for case in CASES:\n"
        "    for masked in (False, True):\n"
        "        check(case, masked, 'cpu', torch.float32, 1e-4)\n"
    )
    done = run([sys.executable, "-c", code], env={"TRITON_INTERPRET": "1"})
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "close"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2), (torch.float16, 5e-3)]
)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_the_kernel_equals_the_reference(case, masked, dtype, close):
    check(case, masked, "cuda", dtype, close)
