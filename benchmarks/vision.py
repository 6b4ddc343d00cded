"""The vision tower under SDPA: transformers' loop over windows and frames, against ours.

    python benchmarks/vision.py
    python benchmarks/vision.py --shapes tiny --tokens 256 --device cpu --out tiny.json

Rounds alternate. `calls` are those of SDPA in one forward, `tokens` the merged ones that come out.
`--side` is a frame's, in merged tokens; 16 divides into whole windows, 18 does not.
"""

import argparse
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import RESULTS, settings, write_results
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from purekv import families
from purekv.attention.vision import BatchedChunks
from purekv.bench import random_model, rows
from purekv.bench.phases import Measured
from purekv.bench.stopwatch import Stopwatch
from purekv.loading import DTYPES, find_device


class CountedCalls(TorchFunctionMode):
    """Counts calls of SDPA inside the block."""

    calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += func is F.scaled_dot_product_attention
        return func(*args, **kwargs or {})


@torch.inference_mode()
def measure(tower: nn.Module, side: int, tokens: int, repeats: int) -> Iterator[dict[str, Any]]:
    config, weight = tower.config, next(tower.parameters())
    height = side * config.spatial_merge_size
    frames = max(1, round(tokens / side**2))
    grid_thw = torch.tensor([[frames, height, height]], device=weight.device)
    features = config.in_channels * config.temporal_patch_size * config.patch_size**2
    pixels = torch.randn(frames * height**2, features, device=weight.device, dtype=weight.dtype)
    passes: dict[str, list[Measured]] = {"loop": [], "batched": []}
    outputs: dict[str, Tensor] = {}
    calls: dict[str, int] = {}
    for number in range(1 + repeats):
        for name, measured in passes.items():
            block = BatchedChunks(tower) if name == "batched" else nullcontext()
            counter = CountedCalls() if not number else nullcontext()
            with block, counter, Stopwatch(weight.device) as watch:
                output = tower(pixels, grid_thw=grid_thw).pooler_output
            if number:
                measured.append(Measured(watch.ms, watch.peak_bytes))
            else:  # the first round warms up
                outputs[name], calls[name] = output, counter.calls
    distance = (outputs["batched"] - outputs["loop"]).abs().max() / outputs["loop"].abs().max()
    for name, measured in passes.items():
        yield rows.row(
            "vision", tokens=frames * side**2, batch=1, method=name, side=side, calls=calls[name],
            baseline="sdpa", speedup=rows.speedup(passes["loop"], measured),
            largest_difference=float(distance), **rows.timing(measured),
        )  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default="qwen2.5-vl-7b")
    parser.add_argument("--tokens", default="4096,16384,65536", help="comma-separated")
    parser.add_argument("--side", default="16,18", help="comma-separated")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES)
    parser.add_argument("--out", type=Path, default=RESULTS / "vision.json")
    arguments = parser.parse_args(argv)
    device = find_device(arguments.device)
    model = random_model(arguments.shapes, device, DTYPES[arguments.dtype], num_hidden_layers=1)
    tower = families.for_config(model.config).vision_tower(model)
    tower.config._attn_implementation = "sdpa"
    found: list[dict[str, Any]] = []
    for side in map(int, arguments.side.split(",")):
        for tokens in map(int, arguments.tokens.split(",")):
            for row in measure(tower, side, tokens, arguments.repeats):
                found.append(row)
                print(
                    f"{row['tokens']:6} tokens, side {side}: {row['method']:8} {row['ms']:9.1f} ms "
                    f"[{row['ms_min']:.1f}, {row['ms_max']:.1f}], {row['calls']:6} calls, "
                    f"{row['speedup']:.2f}x, peak {row['peak_bytes'] / 1e9:.1f} GB, "
                    f"differs by {row['largest_difference']:.1e}",
                    flush=True,
                )
            write_results(arguments.out, settings(arguments), found)


if __name__ == "__main__":
    main()
