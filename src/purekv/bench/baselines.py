"""The dense model's attention: what a speed-up is over, and when one of them cannot run."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

from purekv import families
from purekv.bench.workload import Workload
from purekv.memory import free_bytes

BASELINES = {
    "sdpa": "PyTorch's choice of kernel, transformers' default",
    "flash": "PyTorch's FlashAttention-2 kernel",
    "eager": "the whole attention matrix, in plain operations",
}
SPARE = 0.9  # of the free memory that eager attention's scores may take


@contextmanager
def attention(model: PreTrainedModel, baseline: str) -> Iterator[None]:
    """Run the language model with that attention inside the block."""
    config = families.for_config(model.config).language_model(model).config
    before = config._attn_implementation
    config._attn_implementation = "eager" if baseline == "eager" else "sdpa"
    flash = sdpa_kernel(SDPBackend.FLASH_ATTENTION) if baseline == "flash" else nullcontext()
    try:
        with flash:
            yield
    finally:
        config._attn_implementation = before


def why_not(workload: Workload, baseline: str) -> str | None:
    """Why a baseline cannot run on this prompt; None if it can."""
    if baseline == "flash":
        if workload.device.type != "cuda":
            return "FlashAttention-2 needs a CUDA device"
        if workload.model.dtype not in (torch.float16, torch.bfloat16):
            return "FlashAttention-2 needs 16-bit weights; use --dtype bfloat16"
    if baseline == "eager":
        needed, free = eager_bytes(workload), free_bytes(workload.device)
        if free is not None and needed > SPARE * free:
            return (
                f"eager attention's scores take {needed / 2**30:.1f} GiB "
                f"and {free / 2**30:.1f} GiB are free"
            )
    return None


def eager_bytes(workload: Workload) -> int:
    """What one layer of eager attention holds beyond its inputs when it holds most.

    Scores in the model's dtype and their softmax in float32, [B, num_attention_heads, S, S], and
    the mask [B, 1, S, S].
    """
    heads = workload.model.config.get_text_config().num_attention_heads
    dtype_bytes = workload.model.dtype.itemsize
    matrix = workload.batch * workload.prompt_tokens**2
    return matrix * (heads * (dtype_bytes + 4) + dtype_bytes)
