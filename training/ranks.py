"""The processes of a `torchrun`, one GPU each; a plain `python` is the only one of its kind."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


class Ranks:
    def __init__(self, device: str) -> None:
        self.size = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        self.device = torch.device(device)
        if self.size > 1:
            backend = "cpu:gloo"
            if self.device.type == "cuda":
                self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
                torch.cuda.set_device(self.device)
                backend += ",cuda:nccl"
            dist.init_process_group(backend)

    def agree(self, value: float) -> float:
        """Rank 0's value, so that all stop, and set their rates, at the same step."""
        if self.size == 1:
            return value
        box = torch.tensor(value, dtype=torch.float64)
        dist.broadcast(box, 0)
        return box.item()

    def average(self, gradients: Sequence[Tensor]) -> None:
        """In place, over all ranks: as one tensor, since many small ones would wait on latency."""
        if self.size == 1:
            return
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        flat /= self.size
        parts = flat.split([gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))

    def close(self) -> None:
        if self.size > 1:
            dist.destroy_process_group()
