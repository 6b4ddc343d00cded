"""Heads spread over the ranks of tensor parallelism (transformers' `tp_plan="auto"`)."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel

from purekv.errors import PureKVError


@dataclass(frozen=True)
class HeadShards:
    """Which share of every layer's heads this process holds.

    Each rank scores, selects and stores its own KV heads; only what means over all heads need
    travels, one small collective at each source layer. All ranks get the same means, so they agree
    on what stays.
    """

    size: int = 1
    rank: int = 0
    group: dist.ProcessGroup | None = None

    @classmethod
    def of(cls, model: PreTrainedModel, num_key_value_heads: int) -> "HeadShards":
        """That of a loaded model.

        Raises:
            PureKVError: the ranks cannot have equally many KV heads.
        """
        mesh = getattr(model, "_device_mesh", None)
        if mesh is None:
            return cls()
        if "tp" in (mesh.mesh_dim_names or ()):
            mesh = mesh["tp"]
        if mesh.ndim != 1 or mesh.size() == 1:
            return cls()
        if num_key_value_heads % mesh.size():
            raise PureKVError(
                f"{num_key_value_heads} KV heads cannot be spread evenly over {mesh.size()} ranks; "
                f"start as many processes as divide {num_key_value_heads}"
            )
        return cls(mesh.size(), mesh.get_local_rank(), mesh.get_group())

    def mean(self, own: Tensor) -> Tensor:
        """Mean over all KV heads, [B, S], of what this rank's have, [B, own heads, S].

        The heads are gathered, not summed on the way, so that the order of the sum, and with it the
        last bit of a score, does not depend on the number of ranks.
        """
        if self.size > 1:
            parts = [torch.empty_like(own) for _ in range(self.size)]
            dist.all_gather(parts, own.contiguous(), group=self.group)
            own = torch.cat(parts, 1)
        return own.mean(1)

    def own(self, heads: Tensor) -> Tensor:
        """This rank's part of something that all heads have, [B, num_key_value_heads, ...]."""
        return heads.chunk(self.size, 1)[self.rank] if self.size > 1 else heads


WHOLE = HeadShards()
