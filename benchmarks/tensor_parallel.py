"""Prefill and decoding on one GPU and on several, dense and compressed, with random weights.

    python benchmarks/tensor_parallel.py --out one.json
    torchrun --nproc-per-node 2 benchmarks/tensor_parallel.py --out two.json
    torchrun --nproc-per-node 2 benchmarks/tensor_parallel.py --shapes tiny --tokens 500 \\
        --device cpu --out tiny.json

Rank 0 writes a random checkpoint to `--weights` (a temporary folder by default), all ranks load
their share of it through transformers' `tp_plan="auto"`. `gpus` in a row is the number of ranks,
`collective_ms` what PureKV's own collectives took of `ms`, each on the rank that came last, as the
others wait for it there; those of the model are in both its dense and its compressed times.
`peak_bytes` and `kv_bytes` are rank 0's. `--layers` shortens a model that does not fit. Rounds of
dense and compressed passes alternate, and `speedup` is over the dense pass on as many GPUs.
"""

import argparse
import os
import tempfile
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from common import RESULTS, settings, write_results
from torch import Tensor
from transformers import AutoModelForImageTextToText, PreTrainedModel
from transformers.cache_utils import DynamicCache

from purekv import PureKV, PureKVConfig, SpatioTemporalConfig, families
from purekv.attention.vision import BatchedChunks
from purekv.bench import SHAPES, Workload, random_inputs, random_model, rows
from purekv.bench.phases import Measured, decode, prefill
from purekv.bench.stopwatch import Laps
from purekv.loading import DTYPES, find_device
from purekv.parallel import HeadShards

RANKS, RANK = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
SPARSE = {"prefill": "spatiotemporal", "spatiotemporal": SpatioTemporalConfig(min_tokens=0)}
MODES: dict[str, dict[str, Any]] = {
    "post": {},
    "sparse": SPARSE,
    "drop": {"evict": "drop", "source_layers": (2,)},
    "sparse_drop": {"evict": "drop", "source_layers": (2,), **SPARSE},
}


def main() -> None:
    arguments = parse()
    device = find_device(arguments.device)
    with tempfile.TemporaryDirectory() as scratch:
        folder = shared(arguments.weights or Path(scratch) / "model")
        model = load(folder, arguments, device)
    shards = HeadShards.of(model, model.config.get_text_config().num_key_value_heads)
    if shards.size != RANKS:
        raise SystemExit(f"{RANKS} processes, but the model is spread over {shards.size}")
    found: list[dict[str, Any]] = []
    for tokens in arguments.tokens:
        for row in measure(model, tokens, arguments):
            found.append(row)
            if RANK == 0:
                print({key: value for key, value in row.items() if value is not None}, flush=True)
        if RANK == 0:
            write_results(arguments.out, settings(arguments), found)
    if RANKS > 1:
        dist.barrier()
        dist.destroy_process_group()


def shared(folder: Path) -> Path:
    """Rank 0's folder, on every rank."""
    if RANKS == 1:
        return folder
    if not dist.is_initialized():
        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    box = [str(folder)]
    dist.broadcast_object_list(box, 0)
    return Path(box[0])


def load(folder: Path, arguments: argparse.Namespace, device: torch.device) -> PreTrainedModel:
    dtype = DTYPES[arguments.dtype]
    if RANKS == 1:
        return random_model(arguments.shapes, device, dtype, arguments.layers)
    if RANK == 0 and not (folder / "config.json").exists():
        model = random_model(arguments.shapes, device, dtype, arguments.layers)
        model.save_pretrained(folder)
        del model
        if device.type == "cuda":
            torch.cuda.empty_cache()
    dist.barrier()
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype, tp_plan="auto")
    dist.barrier()
    return model.eval()


@torch.inference_mode()
def measure(
    model: PreTrainedModel, tokens: int, arguments: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    tower = families.for_config(model.config).vision_tower(model)
    with BatchedChunks(tower) if tower is not None else nullcontext():
        workload = Workload.prepare(model, random_inputs(model.config, tokens))
    configs = {
        mode: PureKVConfig(budget=arguments.budget, first_token="exact", **MODES[mode])
        for mode in arguments.modes
    }
    passes: dict[str | None, list[tuple[Measured, Measured, float]]] = {}
    for number in range(1 + arguments.repeats):
        for mode in (None, *configs):
            one = once(workload, configs[mode] if mode else None, arguments.steps)
            if number:  # the first round warms up
                passes.setdefault(mode, []).append(one)
    dense = passes[None]
    for mode, measured in passes.items():
        config = configs[mode] if mode else None
        for place, what in enumerate(("lm_prefill", "decode")):
            times = [one[place] for one in measured]
            values = rows.timing(times) | rows.method(config)
            values |= {"tokens": workload.tokens, "batch": 1, "baseline": "sdpa"}
            values["speedup"] = rows.speedup([one[place] for one in dense], times)
            extra: dict[str, Any] = {"gpus": RANKS}
            if what == "lm_prefill":
                extra["collective_ms"] = median(one[2] for one in measured)
            else:
                values["tok_s"] = 1000 / values["ms"]
            yield rows.row(what, **values) | extra


def once(
    workload: Workload, config: PureKVConfig | None, steps: int
) -> tuple[Measured, Measured, float]:
    """Prefill, decoding, and milliseconds of PureKV's collectives in the prefill."""
    laps, cache = Laps(workload.device), DynamicCache()
    numbers, mean = count(), HeadShards.mean

    def timed(shards: HeadShards, x: Tensor) -> Tensor:
        with laps(str(next(numbers))):
            return mean(shards, x)

    with PureKV(config)(workload.model) if config else nullcontext():
        with patch.object(HeadShards, "mean", timed if RANKS > 1 else mean):
            first = prefill(workload, cache)
        second = decode(workload, cache, steps)
    each = torch.tensor([*laps.ms.values(), 0.0])
    if RANKS > 1:
        dist.all_reduce(each, dist.ReduceOp.MIN)
    return first, second, float(each.sum())


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", choices=SHAPES, default="qwen2.5-vl-7b")
    parser.add_argument("--layers", type=int, help="of the language model; default: the shape's")
    parser.add_argument("--tokens", type=numbers, default=[65_536, 131_072])
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--budget", type=float, default=0.2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=16, help="tokens decoded")
    parser.add_argument("--weights", type=Path, help="folder of the random checkpoint")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--out", type=Path, default=RESULTS / f"tensor_parallel_{RANKS}.json")
    return parser.parse_args()


def numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


if __name__ == "__main__":
    main()
