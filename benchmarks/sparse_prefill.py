"""Sparse prefill against dense attention: one attention layer, then a whole language model.

    python benchmarks/sparse_prefill.py
    python benchmarks/sparse_prefill.py --device cpu --shape tiny --tokens 512,1024 --out tiny.json

Random weights and activations at a published shape, one video of 16 x 16 tokens a frame between 16
text tokens and a question of 64. Rows "attention_layer" are the attention alone, on strided tensors
as a model hands them over; `speedup` is over the baseline of the same round, medians of rounds.
Before anything is timed, every way to compute is compared with a masked reference in float32: all
rows of a small prompt, some of the large one. `error` is relative, `dense_error` what the dense
baseline errs in the same precision. Rows "lm_prefill" are those of `purekv bench`.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from common import RESULTS, settings, write_results
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from purekv import PureKVConfig, SpatioTemporalConfig
from purekv.attention.partial import plain_attention
from purekv.attention.pattern import Pattern, row_patterns
from purekv.attention.spatiotemporal import sparse_attention
from purekv.bench.baselines import SPARE
from purekv.bench.phases import Measured
from purekv.bench.rows import row, timing
from purekv.bench.shapes import BEFORE, QUESTION, frame_grid, shape_config
from purekv.bench.stopwatch import Stopwatch
from purekv.bench.subjects import RandomSubject
from purekv.bench.suite import Plan, measure_prompt
from purekv.layout import Layout, VisualSpan
from purekv.loading import DTYPES, find_device
from purekv.memory import free_bytes

Attention = Callable[[], Tensor]


@dataclass(frozen=True)
class Layer:
    """Inputs of one attention layer, [1, heads, S, D] as views of [1, S, heads, D]."""

    query: Tensor
    key: Tensor
    value: Tensor
    tokens: int
    layout: Layout

    @classmethod
    def random(cls, shape: str, tokens: int, device: torch.device, dtype: torch.dtype) -> "Layer":
        text = shape_config(shape).text_config
        head_dim = text.hidden_size // text.num_attention_heads
        frames, side = frame_grid(tokens)
        visual = frames * side**2
        length = BEFORE + visual + QUESTION
        generator = torch.Generator(device).manual_seed(0)

        def states(heads: int) -> Tensor:
            size = 1, length, heads, head_dim
            x = torch.randn(size, device=device, dtype=dtype, generator=generator)
            return x.transpose(1, 2)

        span = VisualSpan(BEFORE, (frames, side, side), "video")
        layout = Layout.build(torch.ones(1, length, dtype=torch.bool), [[span]])
        kv_heads = text.num_key_value_heads
        states = states(text.num_attention_heads), states(kv_heads), states(kv_heads)
        return cls(*states, visual, layout)

    @property
    def scaling(self) -> float:
        return self.query.shape[-1] ** -0.5

    def pattern(self, sparse: SpatioTemporalConfig) -> Pattern:
        return row_patterns(self.layout, sparse.tile, sparse.anchor_frames, min_tokens=0)[0]

    def sparse(self, pattern: Pattern) -> Tensor:
        return sparse_attention(self.query, self.key, self.value, self.scaling, [pattern])

    def sdpa(self) -> Tensor:
        out = F.scaled_dot_product_attention(
            self.query, self.key, self.value, is_causal=True, enable_gqa=True, scale=self.scaling
        )
        return out.transpose(1, 2).contiguous()

    def flash(self) -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return self.sdpa()

    def eager(self) -> Tensor:
        groups = self.query.shape[1] // self.key.shape[1]
        key, value = (x.repeat_interleave(groups, dim=1) for x in (self.key, self.value))
        scores = self.query @ key.mT * self.scaling
        length = scores.shape[-1]
        future = torch.ones(length, length, dtype=torch.bool, device=scores.device).triu_(1)
        scores.masked_fill_(future, -torch.inf)
        weights = scores.softmax(-1, dtype=torch.float32).to(value.dtype)
        return (weights @ value).transpose(1, 2).contiguous()

    def why_not(self, baseline: str) -> str | None:
        """Why it cannot run; None if it can."""
        length, heads = self.query.shape[2], self.query.shape[1]
        if baseline == "flash" and (self.query.device.type != "cuda" or self.query.itemsize != 2):
            return "FlashAttention-2 needs a CUDA device and 16-bit weights"
        free = free_bytes(self.query.device)
        needed = heads * length**2 * (2 * self.query.itemsize + 4)
        if baseline == "eager" and free is not None and needed > SPARE * free:
            return f"eager attention's scores take {needed / 2**30:.1f} GiB"
        return None


def relative_error(layer: Layer, pattern: Pattern, out: Tensor, at: Tensor) -> float:
    """Of `out` [1, S, H, D] at some positions, against the mask and a float32 softmax."""
    length = layer.query.shape[2]
    visible = pattern.visible(at, length).to(out.device)
    at = at.to(out.device)
    query = layer.query[:, :, at]
    exact = plain_attention(query, layer.key, layer.value, layer.scaling, visible).out
    error = out[:, at].transpose(1, 2).float() - exact
    return float(error.norm() / exact.norm())


def checked(layer: Layer, patterns: dict[int, Pattern], at: Tensor) -> dict[str, Any]:
    """Relative errors; leaves the program where the sparse ones are not as small as the dense."""
    whole = Pattern((0, layer.query.shape[2]))
    dense = relative_error(layer, whole, layer.sdpa(), at)
    errors = {t: relative_error(layer, p, layer.sparse(p), at) for t, p in patterns.items()}
    worst = max(errors.values())
    if not worst <= 2 * dense + 1e-6:
        sys.exit(f"wrong at {layer.tokens} tokens: sparse errs by {errors}, dense by {dense:.2g}")
    return {"error": errors, "dense_error": dense}


def spots(length: int) -> Tensor:
    """Some positions of every kind: the first ones, some of the video, the question's last."""
    some = torch.randint(0, length, (48,), generator=torch.Generator().manual_seed(0))
    return torch.cat([torch.arange(8), some, torch.arange(length - 8, length)]).unique()


def layer_rows(
    layer: Layer, patterns: dict[int, Pattern], baselines: list[str], repeats: int
) -> Iterator[dict[str, Any]]:
    """What one layer's attention takes, dense and with tiles of each side."""
    device = layer.query.device
    errors = checked(layer, patterns, spots(layer.query.shape[2]))
    ways: dict[str | int, Attention] = {}
    skipped: dict[str, str] = {}
    for name in baselines:
        reason = layer.why_not(name)
        if reason is None:
            ways[name] = getattr(layer, name)
        else:
            skipped[name] = reason
    ways |= {tile: lambda p=pattern: layer.sparse(p) for tile, pattern in patterns.items()}
    measured: dict[str | int, list[Measured]] = {way: [] for way in ways}
    for number in range(1 + repeats):
        for way, run in ways.items():
            with Stopwatch(device) as watch:
                run()
            if number:
                measured[way].append(Measured(watch.ms, watch.peak_bytes))

    length = layer.query.shape[2]
    dense_pairs = length * (length + 1) // 2
    unit = 4 * layer.query.shape[1] * layer.query.shape[-1] / 1e9  # GFLOP a pair

    def values(way: str | int, pairs: int) -> dict[str, Any]:
        numbers = timing(measured[way])
        speed = {"pairs": pairs / dense_pairs, "tflop_s": pairs * unit / numbers["ms"]}
        return {"tokens": layer.tokens, "batch": 1, **numbers, **speed}

    for name in baselines:
        if name in skipped:
            skip = {"baseline": name, "skipped": skipped[name]}
            yield row("attention_layer", tokens=layer.tokens, batch=1, prefill="dense", **skip)
        else:
            dense = values(name, dense_pairs)
            yield row("attention_layer", prefill="dense", baseline=name, speedup=1.0, **dense)
    for tile, pattern in patterns.items():
        sparse = values(tile, pattern.pairs())
        sparse |= {"error": errors["error"][tile], "dense_error": errors["dense_error"]}
        for name in baselines:
            if name in skipped:
                continue
            pairs = zip(measured[name], measured[tile], strict=True)
            speedup = median(theirs.ms / ours.ms for theirs, ours in pairs)
            yield row(
                "attention_layer", prefill="spatiotemporal", tile=tile, baseline=name,
                speedup=speedup, **sparse,
            )  # fmt: skip


def configs(sparse: SpatioTemporalConfig) -> tuple[PureKVConfig, ...]:
    """All tokens computed; then 20% and 10% of them above layer 2; and 35% above layer 4, which is
    the embedded model's plan for 3.16x (layer 5 of 30) at 28 layers."""
    common: dict[str, Any] = {"prefill": "spatiotemporal", "spatiotemporal": sparse}
    drop = {"evict": "drop", "source_layers": (2,)}
    return (
        PureKVConfig(budget=1.0, **common),
        PureKVConfig(budget=0.2, **common, **drop),
        PureKVConfig(budget=0.1, **common, **drop),
        PureKVConfig(budget=0.2, **drop),
        PureKVConfig(budget=0.35, **common, **(drop | {"source_layers": (4,)})),
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shape", default="qwen2.5-vl-7b")
    parser.add_argument("--tokens", default="16384,32768,65536,131072")
    parser.add_argument("--tiles", default="2,4")
    parser.add_argument("--anchor-frames", type=int, default=1)
    parser.add_argument("--baselines", default="sdpa,flash,eager")
    parser.add_argument("--what", default="attention_layer,lm_prefill")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto", help="auto: bfloat16, on a CPU float32")
    parser.add_argument("--out", type=Path, default=RESULTS / "sparse_prefill.json")
    return parser.parse_args()


@torch.inference_mode()
def main() -> None:
    arguments = parse()
    device = find_device(arguments.device)
    name = arguments.dtype
    if name == "auto":
        name = "float32" if device.type == "cpu" else "bfloat16"
    lengths, tiles = (
        [int(x) for x in text.split(",")] for text in (arguments.tokens, arguments.tiles)
    )
    baselines, whats = arguments.baselines.split(","), arguments.what.split(",")
    sparse = {
        tile: SpatioTemporalConfig(tile, arguments.anchor_frames, min_tokens=0) for tile in tiles
    }
    rows: list[dict[str, Any]] = []

    def keep(found: Iterator[dict[str, Any]] | list[dict[str, Any]]) -> None:
        for one in found:
            rows.append(one)
            shown = {key: value for key, value in one.items() if value is not None}
            print(shown, file=sys.stderr, flush=True)
        write_results(arguments.out, settings(arguments), rows)  # so far

    if "attention_layer" in whats:
        small = Layer.random(arguments.shape, 1024, device, DTYPES[name])
        checked(
            small,
            {tile: small.pattern(one) for tile, one in sparse.items()},
            torch.arange(small.query.shape[2]),
        )
        for tokens in lengths:
            layer = Layer.random(arguments.shape, tokens, device, DTYPES[name])
            patterns = {tile: layer.pattern(one) for tile, one in sparse.items()}
            keep(layer_rows(layer, patterns, baselines, arguments.repeats))
    if "lm_prefill" in whats:
        subject = RandomSubject(arguments.shape, arguments.device, name)
        model = subject.model()
        plan = Plan(configs(sparse[tiles[0]]), tuple(baselines), ("lm_prefill",), arguments.repeats)
        for tokens in lengths:
            keep(measure_prompt(model, subject.inputs(tokens), 1, plan))


if __name__ == "__main__":
    main()
