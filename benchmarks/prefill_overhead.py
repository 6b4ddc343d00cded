"""What compression costs and saves in prefill: time, peak memory, bytes; dense against CLIE.

    python benchmarks/prefill_overhead.py --shape qwen2.5-vl-7b --frames 64 128 256

Only the language model runs (random weights and embeddings). Dense and compressed runs alternate,
so that a drifting clock favours neither; medians of the paired runs are reported.
"""

import argparse
import contextlib
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, settings, write_results
from shapes import SHAPES, random_model, video_prompt
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import DynamicCache

from purekv import PureKV, PureKVConfig
from purekv.cache import EvictingLayer, cache_bytes
from purekv.prefill import Prefill
from purekv.upstream import CACHE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="qwen2.5-vl-7b")
    parser.add_argument("--frames", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.2, 0.1])
    parser.add_argument("--scorers", nargs="+", default=["clie", "snapkv"])
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS / "prefill_overhead.json")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = random_model(arguments.shape, device)
    rows = []
    for frames in arguments.frames:
        prompt = video_prompt(model, frames)
        rows += measure(model, prompt, frames * 256, arguments)
    write_results(arguments.out, settings(arguments), rows)


@torch.inference_mode()
def measure(model: Any, prompt: dict[str, Any], tokens: int, arguments: Any) -> list[dict]:
    variants: dict[str, Any] = {"dense": None}
    for budget in arguments.budgets:
        variants[f"clie {budget}"] = PureKVConfig(budget=budget)
    variants["clie one source"] = PureKVConfig(budget=arguments.budgets[0], source_layers=(2,))
    for scorer in arguments.scorers:
        if scorer != "clie":
            variants[scorer] = PureKVConfig(budget=arguments.budgets[0], scorer=scorer)
    variants["compressed first token"] = PureKVConfig(
        budget=arguments.budgets[0], first_token="compressed"
    )
    times: dict[str, list[float]] = {name: [] for name in variants}
    facts: dict[str, dict[str, Any]] = {}
    for round_ in range(arguments.repeat + 1):  # the first warms up
        for name, config in variants.items():
            ms, fact = prefill(model, prompt, config)
            facts[name] = fact
            if round_:
                times[name].append(ms)
    flash = None
    if torch.cuda.is_available():
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            prefill(model, prompt, None)
            flash = statistics.median(prefill(model, prompt, None)[0] for _ in range(3))
    dense = statistics.median(times["dense"])
    rows = []
    for name, config in variants.items():
        paired = [ours / theirs for ours, theirs in zip(times[name], times["dense"], strict=True)]
        row = {
            "what": "lm_prefill" if config is None else "overhead",
            "variant": name,
            "tokens": tokens,
            "batch": 1,
            "prefill": "dense",
            "evict": None if config is None else "post",
            "scorer": None if config is None else config.scorer,
            "budget": 1.0 if config is None else config.budget,
            "ms": statistics.median(times[name]),
            "ms_spread": [min(times[name]), max(times[name])],
            "baseline": "sdpa",
            "speedup": 1 / statistics.median(paired),
            "overhead": statistics.median(paired) - 1,
            "speedup_over_flash": None if flash is None else flash / statistics.median(times[name]),
            **facts[name],
        }
        if config is not None:
            row |= phases(model, prompt, config)
        rows.append(row)
        print(
            f"{tokens:>6} {name:<26} {row['ms']:8.1f} ms  overhead {100 * row['overhead']:+.2f}%  "
            f"KV {row['kv_bytes'] / 2**20:7.1f} MiB  peak KV {row['kv_bytes_peak'] / 2**20:7.1f}  "
            f"peak above weights {row['peak_bytes'] / 2**20:8.1f} MiB  "
            + " ".join(f"{k}={v:.2f}" for k, v in row.items() if k.startswith("ms_of")),
            flush=True,
        )
    print(f"{tokens:>6} flash backend {flash} ms, dense default {dense:.1f} ms", flush=True)
    return rows


def prefill(model: Any, prompt: dict[str, Any], config: Any) -> tuple[float, dict[str, Any]]:
    """Milliseconds of one language-model prefill, and its bytes.

    `peak_bytes` is what the forward allocated at its worst above what was there before (weights,
    inputs); `kv_bytes_peak` the most that the cache's tensors held at any layer.
    """
    cache = DynamicCache()
    clear()
    before = allocated()
    attached = PureKV(config)(model) if config else contextlib.nullcontext()
    with attached, peak_cache_bytes(cache) as peak:
        start = stamp()
        model.model(**prompt, **{CACHE: cache})
        ms = elapsed(start)
    worst = torch.cuda.max_memory_allocated() - before if torch.cuda.is_available() else 0
    return ms, {
        "kv_bytes": cache_bytes(cache),
        "kv_bytes_peak": peak[0],
        "peak_bytes": worst,
    }


@contextlib.contextmanager
def peak_cache_bytes(cache: Any):
    """The most bytes that the cache held right after any layer's update."""
    peak = [0]
    update = cache.update

    def watched(*args: Any, **kwargs: Any) -> Any:
        result = update(*args, **kwargs)
        held = [layer for layer in cache.layers if layer.keys is not None]
        peak[0] = max(peak[0], sum(x.keys.nbytes + x.values.nbytes for x in held))
        return result

    cache.update = watched
    yield peak
    del cache.update


def phases(model: Any, prompt: dict[str, Any], config: PureKVConfig) -> dict[str, float]:
    """Milliseconds of scoring with selection, and of compaction, each timed with a wait."""
    spent = {"ms_of_scoring_and_selection": 0.0, "ms_of_compaction": 0.0}

    def timed(name: str, function: Any) -> Any:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            start = stamp()
            result = function(*args, **kwargs)
            spent[name] += elapsed(start)
            return result

        return wrapper

    select, evict = Prefill.select, EvictingLayer.evict
    Prefill.select = timed("ms_of_scoring_and_selection", select)  # type: ignore[method-assign]
    EvictingLayer.evict = timed("ms_of_compaction", evict)  # type: ignore[method-assign]
    try:
        prefill(model, prompt, config)
    finally:
        Prefill.select, EvictingLayer.evict = select, evict  # type: ignore[method-assign]
    return spent


def stamp() -> Any:
    if not torch.cuda.is_available():
        return time.perf_counter()
    torch.cuda.synchronize()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def elapsed(start: Any) -> float:
    if not torch.cuda.is_available():
        return 1000 * (time.perf_counter() - start)
    stop = torch.cuda.Event(enable_timing=True)
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop)


def clear() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def allocated() -> int:
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


if __name__ == "__main__":
    main()
