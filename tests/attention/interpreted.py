"""The Triton kernel in Triton's interpreter, on the CPU. Needs a process of its own, as Triton is
either interpreted or compiled: `TRITON_INTERPRET=1 pytest tests/attention/interpreted.py`."""

from typing import Any

import pytest
import torch

from purekv.attention import triton_temporal, triton_temporal_kernel
from purekv.attention.pattern import row_patterns
from purekv.attention.spatiotemporal import sparse_attention
from purekv.attention.triton_temporal import add_context_and_earlier_frames
from purekv.layout import Layout, VisualSpan
from tests.attention.clips import SHAPES, clip_tensors, in_pytorch
from tests.attention.reference import masked_attention


@pytest.fixture(autouse=True)
def fixed_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small enough for several of each kind; only a GPU can say which are fast."""

    class Fixed:
        def __getitem__(self, grid: Any) -> Any:
            launch = triton_temporal_kernel.kernel[grid]
            return lambda *args, **sizes: launch(*args, BLOCK_M=32, BLOCK_N=16, **sizes)

    monkeypatch.setattr(triton_temporal_kernel, "tuned", Fixed())
    monkeypatch.setattr(triton_temporal, "usable", lambda query: True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])  # its bfloat16 is not right
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_interpreted_kernel(shape, dtype):
    tensors = clip_tensors(shape, dtype, "cpu")
    add_context_and_earlier_frames(**tensors)
    limit = 1e-5 if dtype == torch.float32 else 4e-3
    ours = tensors["out"].float()
    torch.testing.assert_close(ours, in_pytorch(**tensors).float(), rtol=limit, atol=limit)


LAYOUTS = {
    "one video": ([VisualSpan(4, (7, 3, 5), "video")], 120),
    "time stamps": ([VisualSpan(4 + 14 * n, (1, 3, 4), "video", n > 0) for n in range(6)], 90),
    "two videos": ([VisualSpan(3, (4, 2, 2), "video"), VisualSpan(22, (5, 4, 4), "video")], 108),
    "image and video": (
        [VisualSpan(2, (1, 9, 4), "image"), VisualSpan(40, (3, 3, 3), "video")],
        70,
    ),
    "no text": ([VisualSpan(0, (5, 4, 4), "video")], 80),
}


@pytest.mark.parametrize("anchors", [0, 1])
@pytest.mark.parametrize("name", LAYOUTS)
def test_interpreted_kernel_among_the_other_passes(name, anchors):
    spans, length = LAYOUTS[name]
    layout = Layout.build(torch.ones(1, length, dtype=torch.bool), [spans])
    patterns = list(row_patterns(layout, 2, anchors, 1, image_band=8))
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, length, n, 16).transpose(1, 2) for n in (6, 2, 2))
    ours = sparse_attention(query, key, value, 0.3, patterns)
    expected = masked_attention(query, key, value, 0.3, patterns)
    torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-5)
