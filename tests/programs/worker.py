"""One rank of `test_parallel.py`: the sharded model against the whole one, on the same prompts.

torchrun --nproc-per-node N worker.py CHECKPOINT RESULTS.json
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import Qwen2_5_VLForConditionalGeneration as Model

sys.path.insert(0, str(Path(__file__).parents[2]))

from purekv import PureKV, PureKVConfig, SpatioTemporalConfig
from purekv.errors import PureKVError
from purekv.prefill import Prefill
from purekv.scoring import Attended
from tests.core.prompts import prompt

SPARSE: dict[str, Any] = {
    "prefill": "spatiotemporal",
    "spatiotemporal": SpatioTemporalConfig(tile=2, min_tokens=0),
}
CASES: dict[str, dict[str, Any]] = {
    "whole": {"budget": 1.0},
    "post": {},
    "exact first token": {"first_token": "exact"},
    "snapkv": {"scorer": "snapkv"},
    "h2o": {"scorer": "h2o"},
    "random": {"scorer": "random"},
    "pyramid": {"allocation": "pyramid"},
    "active": {"evict": "active", "source_layers": (1,)},
    "drop": {"evict": "drop", "source_layers": (1,)},
    "sparse": SPARSE,
    "sparse drop": {"evict": "drop", "source_layers": (1,), **SPARSE},
}


def main(checkpoint: str, results: str) -> None:
    torch.set_num_threads(1)
    # In float64, as sums over ranks round otherwise and scores may be near ties.
    whole = Model.from_pretrained(checkpoint, dtype=torch.float64).eval()
    sharded = Model.from_pretrained(checkpoint, dtype=torch.float64, tp_plan="auto").eval()
    sharded.generation_config = whole.generation_config
    found = {}
    for name, changes in CASES.items():
        config = PureKVConfig(**{"budget": 0.4, "first_token": "compressed"} | changes)
        alone, together = (outcome(model, config) for model in (whole, sharded))
        parts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, together)
        found[name] = {
            "tokens": all(part["tokens"] == alone["tokens"] for part in parts),
            "kept": joined(parts) == [layer.tolist() for layer in alone["kept"]],
            "reports": all(part["report"] == alone["report"] for part in parts),
            "layers": len(alone["kept"]),
        }
    try:
        PureKV(PureKVConfig(allocation="ada"))(sharded)
        found["ada"] = ""
    except PureKVError as error:
        found["ada"] = str(error)
    if dist.get_rank() == 0:
        Path(results).write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def outcome(model: Model, config: PureKVConfig) -> dict[str, Any]:
    kept: list[torch.Tensor] = []
    select = Prefill.select

    def watch(self: Prefill, attended: Attended) -> Any:
        selection = select(self, attended)
        kept.append(selection.index)
        return selection

    Prefill.select = watch
    try:
        with PureKV(config)(model) as run:
            tokens = model.generate(**prompt("mixed", 3), max_new_tokens=12, do_sample=False)
    finally:
        Prefill.select = select
    report = vars(run.report) | {"seconds": None}
    return {"tokens": tokens.tolist(), "kept": kept, "report": report}


def joined(parts: list[dict[str, Any]]) -> list[Any]:
    """What the heads of all ranks kept, layer by layer."""
    layers = zip(*(part["kept"] for part in parts), strict=True)
    return [torch.cat(layer, 1).tolist() for layer in layers]


if __name__ == "__main__":
    main(*sys.argv[1:])
