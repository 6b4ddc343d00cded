"""Decoding at long prompts: the full cache, concatenated or preallocated, against compressed ones.

    python benchmarks/decode.py
    python benchmarks/decode.py --shapes tiny --tokens 500 --batch 1,2 --device cpu --out tiny.json

Caches are filled with random entries, so that no prompt has to run. `tokens` are those of each row.
`launch` says how a step was started: `eager` by Python, operation by operation, as `generate` does;
`graph` as a replayed CUDA graph of one such step, which is the device's own time; `graph_fused` as
that with norms and MLPs compiled, for dense caches and compressed ones alike. `roofline_ms` is the
time in which the device copies as many bytes as the step must read: the weights of the language
model and the entries of the cache. Where the full cache does not fit, the model has fewer layers
(`layers`), in all rows of that prompt. `speedup` is over the baseline launched alike.

`decode_attention` rows time one layer's attention for each way to serve groups of query heads.
"""

import argparse
import gc
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import chain, count
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import torch
import torch.nn.functional as F
from common import RESULTS, settings, write_results
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForImageTextToText, PreTrainedModel
from transformers.cache_utils import Cache

from purekv import PureKV, PureKVConfig, families
from purekv.attention.packed import packed_attention
from purekv.bench import random_model, rows, shape_config
from purekv.bench.filled import compressed_cache, dynamic_cache, growing_cache
from purekv.bench.phases import Measured
from purekv.bench.stopwatch import Stopwatch
from purekv.cache import ROOM, cache_bytes
from purekv.loading import DTYPES, find_device
from purekv.memory import free_bytes
from purekv.ops.ragged_decode import Segments, has_kernel, ragged_decode
from purekv.upstream import CACHE

WARM_UP = 3
SPARE = 0.93  # of the free memory that weights, the full cache and one layer's copy may take
OUT_OF_MEMORY = "out of memory"

Passes = list[Measured] | str
"""Of one way to run; or why there are none."""


@dataclass(frozen=True)
class Subject:
    """One way to hold the prompt, and to attend to it."""

    baseline: str | None
    """Its name as a dense baseline; None: it is compared with those."""
    config: PureKVConfig | None
    """Of the PureKV block that it decodes in; None: the bare model, dense."""
    fill: Callable[[PreTrainedModel, int, int], Cache]
    """(model, batch, tokens) to a cache."""


def subjects(tokens: int, budgets: list[float], allocations: list[str]) -> Iterator[Subject]:
    yield Subject("dynamic", None, dynamic_cache)
    yield Subject("preallocated", None, growing_cache)
    # All but one entry kept: full, with our attention.
    packed = partial(compressed_cache, kept=tokens - 1)
    yield Subject("preallocated_packed", PureKVConfig(), packed)
    for budget in budgets:
        for allocation in allocations:
            config = PureKVConfig(budget=budget, allocation=allocation)
            kept = max(1, round(budget * tokens))
            fill = partial(compressed_cache, kept=kept, uneven=allocation == "ada")
            yield Subject(None, config, fill)


class Step:
    """One token for every row; its arguments stay where they are, so that it can be captured."""

    def __init__(self, model: PreTrainedModel, cache: Cache, batch: int) -> None:
        self._model, self._cache = model, cache
        length = cache.get_seq_length()
        self._ids = torch.full((batch, 1), 10, device=model.device)
        self._position = torch.full((3, batch, 1), length, device=model.device)
        self.done = 0

    def __call__(self) -> None:
        arguments = {"input_ids": self._ids, "position_ids": self._position, CACHE: self._cache}
        logits = self._model(**arguments).logits
        self._ids.copy_(logits[:, -1:].argmax(-1))
        self._position.add_(1)
        self.done += 1


def captured(step: Step) -> Callable[[], None]:
    """The step as a CUDA graph, at the length that the cache has now."""
    while not 0 < step.done % ROOM <= ROOM - 3:  # a graph must not contain making room
        step()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()  # twice, as what compiles may run otherwise at first
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def timed(
    run: Callable[[], None], device: torch.device, steps: int, repeats: int, kv_bytes: int
) -> list[Measured]:
    for _ in range(WARM_UP):
        run()
    passes = []
    for _ in range(repeats):
        with Stopwatch(device) as watch:
            for _ in range(steps):
                run()
        passes.append(Measured(watch.ms / steps, watch.peak_bytes, kv_bytes))
    return passes


@contextmanager
def fused(model: PreTrainedModel) -> Iterator[None]:
    """Compile what transformers runs as many small operations: norms and MLPs."""
    language = families.for_config(model.config).language_model(model)
    modules = [language.norm]
    for layer in language.layers:
        modules += [layer.input_layernorm, layer.post_attention_layernorm, layer.mlp]
    for module in modules:
        module.compile(dynamic=False)
    try:
        yield
    finally:
        for module in modules:
            module._compiled_call_impl = None


@torch.inference_mode()
def measure(
    model: PreTrainedModel, subject: Subject, batch: int, tokens: int, steps: int, repeats: int
) -> tuple[dict[str, Passes], int]:
    """Passes by launch, or why there are none; and the cache's bytes."""
    device = model.device
    launches = ["eager", "graph", "graph_fused"] if device.type == "cuda" else ["eager"]
    found: dict[str, Passes] = dict.fromkeys(launches, OUT_OF_MEMORY)
    kv_bytes = 0
    try:
        cache = subject.fill(model, batch, tokens)
        kv_bytes = cache_bytes(cache)
        run = partial(timed, device=device, steps=steps, repeats=repeats, kv_bytes=kv_bytes)
        block: AbstractContextManager[Any] = nullcontext()
        if subject.config is not None:
            block = PureKV(subject.config)(model)
        with block:
            step = Step(model, cache, batch)
            found["eager"] = run(step)
            for launch in launches[1:]:
                if subject.baseline == "dynamic":
                    found[launch] = "a graph would hold a second copy of the cache"
                    continue
                with fused(model) if launch == "graph_fused" else nullcontext():
                    found[launch] = unless_it_fails(lambda: run(captured(step)))
    except torch.OutOfMemoryError:
        pass
    return found, kv_bytes


def unless_it_fails(run: Callable[[], list[Measured]]) -> Passes:
    """A capture or a compiler may; what was measured before stays."""
    try:
        return run()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"


def decode_rows(
    model: PreTrainedModel, batch: int, tokens: int, bandwidth: float, arguments: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    layers = model.config.get_text_config().num_hidden_layers
    baselines: dict[str, dict[str, Passes]] = {}
    for subject in subjects(tokens, arguments.budgets, arguments.allocations):
        measured, kv_bytes = measure(
            model, subject, batch, tokens, arguments.steps, arguments.repeats
        )
        gc.collect()
        if model.device.type == "cuda":
            torch.cuda.empty_cache()
        if subject.baseline is not None:
            baselines[subject.baseline] = measured
        moved = step_weights(model) + kv_bytes
        for launch, passes in measured.items():
            values: dict[str, Any] = {
                "tokens": tokens, "batch": batch, "layers": layers, "launch": launch,
                "allocation": None if subject.baseline else subject.config.allocation,
                "roofline_ms": 1000 * moved / bandwidth,
            }  # fmt: skip
            values |= rows.method(None if subject.baseline else subject.config)
            if isinstance(passes, str):
                yield rows.row("decode", **values, baseline=subject.baseline, skipped=passes)
                continue
            values |= rows.timing(passes)
            values["tok_s"] = 1000 * batch / values["ms"]
            if subject.baseline is not None:
                yield rows.row("decode", **values, baseline=subject.baseline, speedup=1.0)
                continue
            for name, theirs in baselines.items():
                # Passes of different caches are not of one round: medians, not paired ratios.
                dense = theirs[launch]
                if not isinstance(dense, str):
                    ratio = median(one.ms for one in dense) / values["ms"]
                    yield rows.row("decode", **values, baseline=name, speedup=ratio)
            if all(isinstance(theirs[launch], str) for theirs in baselines.values()):
                yield rows.row("decode", **values)


@torch.inference_mode()
def attention_rows(
    model: PreTrainedModel, batch: int, tokens: int, arguments: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """One layer's decode attention, on a view as a cache with room lends it."""
    text = model.config.get_text_config()
    heads, groups = text.num_attention_heads, text.num_key_value_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    device, dtype = model.device, model.dtype
    for budget in (1.0, *arguments.budgets):
        kept = max(1, round(budget * tokens))
        query = torch.randn(batch, heads, 1, head_dim, device=device, dtype=dtype)
        shape = 2, batch, groups, kept + ROOM, head_dim
        key, value = torch.randn(shape, device=device, dtype=dtype)[..., :kept, :]
        for name, attend in attentions(query, key, value).items():
            growing = name.endswith("growing")
            if growing and budget < 1:
                continue  # a plan can take a tenth of a second; one length of cache shows it
            steps = 2 if growing else 10
            try:
                passes = timed(attend, device, steps, arguments.repeats, key.nbytes + value.nbytes)
            except RuntimeError as error:
                reason = str(error).splitlines()[0]
                yield rows.row(
                    "decode_attention", tokens=tokens, batch=batch, budget=budget, method=name,
                    skipped=reason,
                )  # fmt: skip
                continue
            timing = rows.timing(passes)
            yield rows.row(
                "decode_attention", tokens=tokens, batch=batch, budget=budget, method=name,
                gb_s=timing["kv_bytes"] / timing["ms"] / 1e6, **timing,
            )  # fmt: skip
        del key, value


def attentions(query: Tensor, key: Tensor, value: Tensor) -> dict[str, Callable[[], Any]]:
    kv = key, value
    groups, length = query.shape[1] // key.shape[1], key.shape[2]

    def packed(key: Tensor, value: Tensor) -> Tensor:
        return packed_attention(query, key, value, None, None)

    def gqa(key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, enable_gqa=True)

    def repeated(key: Tensor, value: Tensor) -> Tensor:
        keys, values = (x.repeat_interleave(groups, 1) for x in (key, value))
        return F.scaled_dot_product_attention(query, keys, values)

    def held(backend: SDPBackend) -> Callable[[Tensor, Tensor], Tensor]:
        def run(key: Tensor, value: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return gqa(key, value)

        return run

    def growing(attend: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], Tensor]:
        """Never the same length twice, as in decoding: some kernels plan anew for each."""
        shorter = count()

        def run() -> Tensor:
            stop = max(1, length - next(shorter))
            return attend(key[..., :stop, :], value[..., :stop, :])

        return run

    def lying(key: Tensor, value: Tensor) -> Tensor:
        """As uneven heads are served where there is a kernel for them; these are even."""
        shape, room = key.shape[:2], key.stride(1) // key.stride(2)
        start = torch.arange(shape.numel(), device=key.device).view(shape) * room
        flat = (x.as_strided((start.numel() * room, x.shape[-1]), (x.stride(2), 1)) for x in kv)
        last = (x[..., -1:, :] for x in kv)
        before = torch.full_like(start, length - 1)
        segments = Segments(*flat, start, before, length - 1, *last, None)
        return ragged_decode(query, segments, key.shape[-1] ** -0.5)

    ways = {"packed": packed, "gqa": gqa, "repeated": repeated}
    if query.is_cuda:
        for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
            ways[f"gqa {backend.name.split('_')[0].lower()}"] = held(backend)
    if has_kernel(query.device):
        ways["ragged"] = lying
    found: dict[str, Callable[[], Any]] = {
        name: partial(attend, key, value) for name, attend in ways.items()
    }
    return found | {f"{name}, growing": growing(ways[name]) for name in ("packed", "gqa")}


def step_weights(model: PreTrainedModel) -> int:
    """Bytes of weights that a step reads: all of the language model but the embeddings."""
    language = families.for_config(model.config).language_model(model)
    modules = *language.layers, language.norm, model.get_output_embeddings()
    return sum(weight.nbytes for module in modules for weight in module.parameters())


def fitting_layers(shape: str, dtype: torch.dtype, batch: int, tokens: int, free: int) -> int:
    """Layers of the language model with which the full cache fits."""
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(shape_config(shape), dtype=dtype)
    text = model.config.get_text_config()
    layers = families.for_config(model.config).language_model(model).layers
    layer = sum(weight.nbytes for weight in layers[0].parameters())
    rest = sum(weight.nbytes for weight in model.parameters()) - layer * len(layers)
    head_dim = text.hidden_size // text.num_attention_heads
    entry = 2 * text.num_key_value_heads * head_dim * dtype.itemsize
    cache = batch * tokens * entry
    return max(1, min(len(layers), int((SPARE * free - rest - cache) / (layer + cache))))


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second that the device moves in a copy, read and written."""
    size = 2**32 if device.type == "cuda" else 2**27
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    passes = timed(lambda: target.copy_(source), device, 4, 5, 0)  # type: ignore[arg-type]
    return 2 * size / median(one.ms for one in passes) * 1000


def words(text: str) -> list[str]:
    return text.split(",")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default="qwen2.5-vl-7b")
    parser.add_argument("--tokens", default="32768", help="comma-separated")
    parser.add_argument("--batch", default="32,8,1", help="comma-separated")
    parser.add_argument("--budgets", default="0.2,0.1", help="comma-separated shares")
    parser.add_argument("--allocations", default="uniform,ada", help="comma-separated")
    parser.add_argument("--layers", type=int, help="of the language model; default: what fits")
    parser.add_argument("--steps", type=int, default=8, help="in a pass")
    parser.add_argument("--repeats", type=int, default=5, help="passes")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES)
    parser.add_argument("--out", type=Path, default=RESULTS / "decode.json")
    arguments = parser.parse_args(argv)
    config = settings(arguments)
    arguments.budgets = [float(word) for word in words(arguments.budgets)]
    arguments.allocations = words(arguments.allocations)
    device, dtype = find_device(arguments.device), DTYPES[arguments.dtype]
    shape_config(arguments.shapes)

    bandwidth = copy_bandwidth(device)
    print(f"a copy moves {bandwidth / 1e9:.0f} GB/s, reads and writes together", flush=True)
    found: list[dict[str, Any]] = []
    model = None
    for tokens in map(int, words(arguments.tokens)):
        for batch in map(int, words(arguments.batch)):
            layers = arguments.layers
            if layers is None:
                free = free_bytes(device)
                if model is not None and device.type == "cuda":
                    free += sum(weight.nbytes for weight in model.parameters())
                layers = fitting_layers(arguments.shapes, dtype, batch, tokens, free or 2**62)
            if model is None or model.config.get_text_config().num_hidden_layers != layers:
                model = None
                gc.collect()
                model = random_model(arguments.shapes, device, dtype, layers)
            for row in chain(
                attention_rows(model, batch, tokens, arguments),
                decode_rows(model, batch, tokens, bandwidth, arguments),
            ):
                found.append(row)
                print(line(row), flush=True)
                write_results(arguments.out, {**config, "copy_gb_s": bandwidth / 1e9}, found)


def line(row: dict[str, Any]) -> str:
    """A row for the eye."""
    what = f"{row['what']:17} {row['tokens']} x {row['batch']:<3}"
    budget = f"{row['budget'] or 1:.0%}"
    name = f"{budget:5} {row['method'] or '':16} {row.get('allocation') or '':8}"
    if row["what"] == "decode":
        name += f" {row['launch']:11} {row['baseline'] or '':20}"
    if row["skipped"]:
        return f"{what} {name} skipped: {row['skipped']}"
    text = f"{what} {name} {row['ms']:9.3f} ms [{row['ms_min']:.3f}, {row['ms_max']:.3f}]"
    if row["what"] == "decode_attention":
        return f"{text} {row['gb_s']:7.0f} GB/s"
    share = row["roofline_ms"] / row["ms"]
    text += f" {row['tok_s']:8.1f} tok/s  roofline {row['roofline_ms']:.2f} ms ({share:.0%})"
    text += f"  peak {row['peak_bytes'] / 1e9:.1f} GB  kv {row['kv_bytes'] / 1e9:.2f} GB"
    return f"{text}  {row['speedup']:.2f}x" if row["speedup"] else text


if __name__ == "__main__":
    main()
