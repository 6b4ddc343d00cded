"""What is timed: the vision tower, the language model's prefill, the first token, decoding."""

from dataclasses import dataclass

import torch
from transformers.cache_utils import Cache, DynamicCache

from purekv import families
from purekv.bench.stopwatch import Stopwatch
from purekv.bench.workload import Workload
from purekv.cache import cache_bytes
from purekv.upstream import CACHE


@dataclass(frozen=True)
class Measured:
    """One pass of one phase."""

    ms: float
    peak_bytes: int
    """Most memory in use during the pass; see `purekv.memory.PeakMemory`."""
    kv_bytes: int | None = None
    """Bytes of the cache's tensors at the end of prefill."""


def encode_pixels(workload: Workload) -> Measured:
    """The vision tower alone, on the prompt's pixels."""
    tower = families.for_config(workload.model.config).vision_tower(workload.model)
    assert tower is not None  # its pixels were asked for
    with Stopwatch(workload.device) as watch:
        for args, kwargs in workload.tower_calls:
            tower(*args, **kwargs)
    return Measured(watch.ms, watch.peak_bytes)


def prefill(workload: Workload, cache: Cache) -> Measured:
    """The language model alone, from embeddings to a filled cache."""
    multimodal = families.for_config(workload.model.config).multimodal_model(workload.model)
    with Stopwatch(workload.device) as watch:
        multimodal(**workload.embedded, **{CACHE: cache})
    return Measured(watch.ms, watch.peak_bytes, cache_bytes(cache))


def decode(workload: Workload, cache: Cache, steps: int) -> Measured:
    """Greedy decoding behind a prefill; milliseconds of one step, which is a token a row."""
    kv_bytes = cache_bytes(cache)
    ids = workload.inputs["input_ids"][:, -1:]
    with Stopwatch(workload.device) as watch:
        for step in range(steps):
            position = workload.next_position
            where = {} if position is None else {"position_ids": position + step}
            output = workload.model(input_ids=ids, **where, **{CACHE: cache})
            ids = output.logits[:, -1:].argmax(-1)
    return Measured(watch.ms / steps, watch.peak_bytes, kv_bytes)


def first_token(workload: Workload) -> Measured:
    """From pixels to the first token: vision tower, prefill and the language model's head."""
    cache = DynamicCache()
    with Stopwatch(workload.device) as watch:
        output = workload.model(**workload.inputs, **{CACHE: cache}, logits_to_keep=1)
        torch.argmax(output.logits, -1)
    return Measured(watch.ms, watch.peak_bytes, cache_bytes(cache))
