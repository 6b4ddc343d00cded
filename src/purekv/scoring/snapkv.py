"""SnapKV (arXiv:2404.14469, section 4): every layer measures its own window attention."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from purekv.scoring.base import LayerInputs


@dataclass(frozen=True)
class SnapKV:
    """Window attention of each KV head, max-pooled over neighbouring positions.

    The observation window is the run's (`PureKVConfig.window`); the query heads of a KV group are
    averaged, which keeps one set per KV head as the cache stores it.
    """

    kernel_size: int = 7

    def observes(self, layer_idx: int) -> bool:
        return True

    def observe(self, layer: LayerInputs) -> Tensor:
        return layer.window_attention.mean(2)

    def score(self, layer: LayerInputs, observed: Tensor | None) -> Tensor:
        assert observed is not None
        return F.max_pool1d(observed, self.kernel_size, stride=1, padding=self.kernel_size // 2)
