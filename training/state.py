"""Training state without pickles: safetensors only, or just the weights that the package ships."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

Groups = dict[str, dict[str, Tensor]]


def save_state(path: Path, groups: Groups, optimizer: torch.optim.Optimizer, stage: str) -> None:
    """Weights as `group/name` and the optimizer's moments as `optimizer/number/name`."""
    flat = {
        f"{group}/{name}": value for group, part in groups.items() for name, value in part.items()
    }
    for number, moments in optimizer.state_dict()["state"].items():
        flat |= {f"optimizer/{number}/{name}": value for name, value in moments.items()}
    flat = {name: value.detach().cpu().contiguous() for name, value in flat.items()}
    temporary = path.with_name(f".{path.name}")
    save_file(flat, temporary, metadata={"stage": stage})
    temporary.replace(path)


def load_state(path: Path) -> tuple[Groups, dict[int, dict[str, Tensor]], str]:
    """Groups of weights, the optimizer's moments by parameter number, and the stage that wrote it.

    `path`: a file of `save_state`, or a folder of the package's weight shards, which has neither
    label heads nor moments: training then resumes from weights alone.
    """
    groups: Groups = defaultdict(dict)
    if path.is_dir():
        for shard in sorted(path.glob("*.safetensors")):
            weights = {name: value.float() for name, value in load_file(shard).items()}
            groups[shard.stem.split("-")[0]] |= weights
        return groups, {}, ""
    moments: dict[int, dict[str, Tensor]] = defaultdict(dict)
    with safe_open(path, framework="pt") as file:
        stage = file.metadata()["stage"]
        for key in file.keys():  # noqa: SIM118  (not a dict)
            group, name = key.split("/", 1)
            if group == "optimizer":
                number, name = name.split("/")
                moments[int(number)][name] = file.get_tensor(key)
            else:
                groups[group][name] = file.get_tensor(key)
    return groups, moments, stage
