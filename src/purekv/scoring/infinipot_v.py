"""InfiniPot-V (arXiv:2506.15745, section 4): what is new in time, and what has long values."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from purekv.layout import Medium, media_of
from purekv.scoring.base import LayerInputs


@dataclass(frozen=True)
class InfiniPotV:
    """Temporal-axis redundancy (TaR) and value norm (VaN), each for a part of the budget.

    TaR of a token is minus the mean cosine similarity of its key to the keys at the same place in
    the newest `recent` of the video's frames. VaN is the L2 norm of the value, averaged over
    neighbours as the depth of the layer says: 7x7 places of its frame in the first quarter of the
    layers, 5x5 in the second, 3 tokens in the third, none in the last.

    **How the two are combined.** The paper gives TaR a share of the places and VaN the others. So
    that one score serves every budget, tokens are ranked by each measure (0 is best; a row and
    head by itself) and score `-min(rank_TaR / share, rank_VaN / (1 - share))`: for any budget the
    tokens kept are the best of both lists, in that proportion. Images and videos of one frame have
    no TaR and compete by VaN alone.

    Where we differ: the paper compresses again and again while a video streams in, and always
    keeps the recent frames; here a video is compressed once, to budgets that may not even hold
    these frames, so they compete too, each against the other recent ones. Pooling at a border
    averages what is inside the frame. One KV head's ranks do not depend on another's.
    """

    num_layers: int
    share: float = 0.5
    """TaR's part of the places."""
    recent: float = 0.25
    """Recent frames, as a share of the video's; at least one."""

    def observes(self, layer_idx: int) -> bool:
        return False

    def observe(self, layer: LayerInputs) -> Tensor:
        raise NotImplementedError

    def score(self, layer: LayerInputs, observed: Tensor | None) -> Tensor:
        novelty = torch.full_like(layer.value_norm, -torch.inf)  # [B, Hkv, S]
        norm = novelty.clone()
        for row, spans in enumerate(layer.layout.spans):
            for medium in media_of(spans):
                part = medium.positions(norm.device)
                if medium.grid[0] > 1:
                    novelty[row, :, part] = self._novelty(layer.key[row, :, part], medium)
                norm[row, :, part] = self._pooled(
                    layer.value_norm[row, :, part], medium, layer.layer_idx
                )
        by_novelty = _rank(novelty).masked_fill_(novelty == -torch.inf, torch.inf)
        return -torch.minimum(by_novelty / self.share, _rank(norm) / (1 - self.share))

    def _novelty(self, key: Tensor, medium: Medium) -> Tensor:
        """float32 [Hkv, n] of the keys [Hkv, n, D] of one video."""
        frames = medium.grid[0]
        recent = max(1, int(self.recent * frames))
        key = F.normalize(key.float(), dim=-1).unflatten(1, (frames, -1))  # [Hkv, T, H * W, D]
        newest = key[:, -recent:].sum(1, keepdim=True)
        similarity = (key * newest).sum(-1)  # [Hkv, T, H * W]
        # A recent frame is not compared with itself; alone, it repeats nothing.
        similarity[:, -recent:] -= key[:, -recent:].square().sum(-1)
        similarity[:, :-recent] /= recent
        similarity[:, -recent:] /= max(1, recent - 1)
        return -similarity.flatten(1)

    def _pooled(self, norm: Tensor, medium: Medium, layer_idx: int) -> Tensor:
        """float32 [Hkv, n] of the value norms [Hkv, n] of one image or video."""
        quarter = 4 * layer_idx // self.num_layers
        if quarter == 3:
            return norm
        if quarter == 2:
            return F.avg_pool1d(norm, 3, stride=1, padding=1, count_include_pad=False)
        size = 7 - 2 * quarter
        plane = norm.unflatten(1, medium.grid)  # [Hkv, T, H, W]
        pooled = F.avg_pool2d(plane, size, stride=1, padding=size // 2, count_include_pad=False)
        return pooled.flatten(1)


def _rank(score: Tensor) -> Tensor:
    """Place of each position among its row and head, float32 [B, H, S]; 0 is the largest score,
    equal ones in order."""
    return score.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1).float()
