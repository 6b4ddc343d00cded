"""How long a video prefills on one GPU with sparse attention and dropping.

    python benchmarks/longest.py
    python benchmarks/longest.py --shape tiny --tokens 512,1024 --device cpu --out tiny.json

Random weights and pixels; the language model alone is timed, once after one pass to warm up. Goes
on from length to length until memory runs out, which is a row too.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, settings, write_results
from transformers.cache_utils import DynamicCache

from purekv import PureKV, PureKVConfig, SpatioTemporalConfig, families
from purekv.attention.vision import BatchedChunks
from purekv.bench import Workload, random_inputs, random_model, rows
from purekv.bench.phases import prefill
from purekv.loading import DTYPES, find_device


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shape", default="qwen2.5-vl-7b")
    parser.add_argument("--tokens", default="131072,262144,393216,524288")
    parser.add_argument("--budgets", default="0.2,0.1")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES)
    parser.add_argument("--out", type=Path, default=RESULTS / "longest.json")
    arguments = parser.parse_args()
    model = random_model(arguments.shape, find_device(arguments.device), DTYPES[arguments.dtype])
    tower = families.for_config(model.config).vision_tower(model)
    assert tower is not None
    found: list[dict[str, Any]] = []
    for tokens in map(int, arguments.tokens.split(",")):
        try:
            with BatchedChunks(tower):
                workload = Workload.prepare(model, random_inputs(model.config, tokens))
            for budget in map(float, arguments.budgets.split(",")):
                found.append(measure(workload, budget))
        except torch.OutOfMemoryError:
            found.append(rows.row("lm_prefill", tokens=tokens, batch=1, skipped="out of memory"))
        write_results(arguments.out, settings(arguments), found)
        if found[-1]["skipped"]:
            return


def measure(workload: Workload, budget: float) -> dict[str, Any]:
    config = PureKVConfig(
        budget=budget, evict="drop", source_layers=(2,), first_token="exact",
        prefill="spatiotemporal", spatiotemporal=SpatioTemporalConfig(min_tokens=0),
    )  # fmt: skip
    with PureKV(config)(workload.model):
        passes = [prefill(workload, DynamicCache()) for _ in range(2)]
    values = rows.method(config) | {"tokens": workload.tokens, "batch": 1}
    row = rows.row("lm_prefill", **values, **rows.timing(passes[1:]))
    print({key: value for key, value in row.items() if value is not None}, file=sys.stderr)
    return row


if __name__ == "__main__":
    main()
