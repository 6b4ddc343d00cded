"""KeyDiff (arXiv:2504.15364, section 3): keys unlike the others are worth keeping."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from purekv.scoring.base import LayerInputs


@dataclass(frozen=True)
class KeyDiff:
    """Negative cosine similarity of each rotated key to the mean direction of its head's keys.

    The mean is over the normalised keys of all tokens, text included, as they share the cache;
    looks at no query.
    """

    def observes(self, layer_idx: int) -> bool:
        return False

    def observe(self, layer: LayerInputs) -> Tensor:
        raise NotImplementedError

    def score(self, layer: LayerInputs, observed: Tensor | None) -> Tensor:
        direction = F.normalize(layer.key.float(), dim=-1)  # [B, Hkv, S, D]
        is_token = layer.layout.is_token[:, None, :, None]
        # The sum points where the mean does; cosines do not see its length.
        anchor = F.normalize(direction.masked_fill(~is_token, 0.0).sum(2), dim=-1)
        return -(direction @ anchor[..., None]).squeeze(-1)
