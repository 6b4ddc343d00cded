"""The Triton kernel against PyTorch: interpreted, and compiled where there is a GPU."""

import sys
from pathlib import Path

import pytest
import torch

from purekv import PureKV, PureKVConfig, SpatioTemporalConfig
from purekv.attention import triton_temporal
from purekv.attention.pattern import Pattern, row_patterns
from purekv.attention.spatiotemporal import sparse_attention
from purekv.attention.triton_temporal import add_context_and_earlier_frames
from purekv.layout import Layout, VisualSpan
from tests.attention.clips import SHAPES, clip_tensors, in_pytorch
from tests.attention.reference import masked_attention
from tests.core.prompts import prompt
from tests.processes import run
from tests.tiny import tiny_model


def test_in_the_interpreter():
    pytest.importorskip("triton")
    tests = Path(__file__).parent / "interpreted.py"
    done = run(
        [sys.executable, "-m", "pytest", "-q", tests],
        env={"TRITON_INTERPRET": "1"},
        cwd=tests.parents[2],
    )
    assert done.returncode == 0, done.stdout


GPU_SHAPES = [
    *((*shape[:6], 64, *shape[7:]) for shape in SHAPES),
    (1, 4, 7, 40, 16, 16, 128, 272, 2),
    (1, 4, 7, 33, 15, 13, 128, 301, 4),
    (2, 2, 6, 19, 9, 7, 80, 3, 3),
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", GPU_SHAPES, ids=str)
def test_compiled_kernel(shape, dtype):
    tensors = clip_tensors(shape, dtype, "cuda")
    assert triton_temporal.usable(tensors["query"])
    add_context_and_earlier_frames(**tensors)
    expected = in_pytorch(**tensors).float()
    torch.testing.assert_close(tensors["out"].float(), expected, rtol=2e-2, atol=1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", [True, False], ids=["triton", "pytorch"])
@pytest.mark.parametrize("tile", [1, 2, 3, 4])
@pytest.mark.parametrize("batch", [1, 2])
def test_sparse_attention_on_the_gpu(monkeypatch, batch, tile, kernel):
    """Errs no more than dense attention in the same precision does."""
    if not kernel:
        monkeypatch.setattr(triton_temporal, "usable", lambda query: False)
    spans = [VisualSpan(16, (13, 9, 10), "video"), VisualSpan(1200, (5, 16, 16), "video")]
    layout = Layout.build(torch.ones(1, 2600, dtype=torch.bool), [spans])
    patterns = list(row_patterns(layout, tile, 1, 1)) * batch
    torch.manual_seed(0)
    query, key, value = (
        torch.randn(batch, 2600, n, 128, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
        for n in (28, 4, 4)
    )
    ours = sparse_attention(query, key, value, 128**-0.5, patterns)
    dense = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, enable_gqa=True
    )
    exact = masked_attention(query, key, value, 128**-0.5, patterns)
    whole = [Pattern(p.tokens) for p in patterns]
    exact_dense = masked_attention(query, key, value, 128**-0.5, whole)
    error = (ours.double() - exact).abs()
    dense_error = (dense.transpose(1, 2).double() - exact_dense).abs()
    assert error.max() <= 1.5 * dense_error.max()
    # Fewer keys make larger outputs, which round more coarsely.
    assert error.mean() / exact.abs().mean() <= 1.5 * dense_error.mean() / exact_dense.abs().mean()


@pytest.mark.gpu
def test_layers_do_not_wait_for_the_device():
    spans = [VisualSpan(3 + 70 * n, (1, 8, 8), "video", n > 0) for n in range(12)]
    layout = Layout.build(torch.ones(1, 900, dtype=torch.bool), [spans])
    patterns = row_patterns(layout, 2, 1, 1)
    query, key, value = (
        torch.randn(1, 900, n, 64, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
        for n in (8, 2, 2)
    )
    sparse_attention(query, key, value, 0.1, patterns)  # the first layer of a prompt may
    torch.cuda.set_sync_debug_mode("error")
    try:
        sparse_attention(query, key, value, 0.1, patterns)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("evict", ["post", "active", "drop"])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_model_on_the_gpu(monkeypatch, batch, evict):
    """With the kernel and without, logits are as close as half precision allows."""
    model = tiny_model().cuda().half()
    inputs = {name: value.cuda() for name, value in prompt("mixed", batch).items()}
    config = PureKVConfig(
        budget=0.3,
        evict=evict,
        prefill="spatiotemporal",
        spatiotemporal=SpatioTemporalConfig(min_tokens=0),
    )
    logits = []
    for kernel in (True, False):
        if not kernel:
            monkeypatch.setattr(triton_temporal, "usable", lambda query: False)
        with PureKV(config)(model) as run, torch.no_grad():
            logits.append(model(**inputs).logits[:, -1].float())
        assert run.report.prefill_per_layer[0] == "spatiotemporal"
    torch.testing.assert_close(*logits, rtol=2e-2, atol=2e-2)
