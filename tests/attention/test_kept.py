"""Attention on kept entries, against a mask in float64."""

import pytest
import torch

from purekv.attention import kept
from purekv.attention.kept import NEVER_SEEN, attend_to_kept


@pytest.mark.parametrize("block", [1, 4, 7, 100])
@pytest.mark.parametrize(("num_kv_heads", "groups"), [(1, 1), (2, 3)])
def test_blocks_equal_one_mask(monkeypatch, block, num_kv_heads, groups):
    """Heads keep different entries; rows are padded on the left; a tail in disorder is behind."""
    monkeypatch.setattr(kept, "BLOCK_QUERIES", block)
    torch.manual_seed(0)
    length, width = 23, 9
    query = torch.randn(2, num_kv_heads * groups, length, 8)
    key, value = torch.randn(2, 2, num_kv_heads, width, 8)
    position = torch.rand(2, num_kv_heads, length).argsort(-1)[..., :width].sort(-1).values
    position[1, :, :2] = NEVER_SEEN
    position[..., -1] = NEVER_SEEN
    position[..., -2] = torch.tensor([length - 3, length - 2])[:, None]
    out = attend_to_kept(query, key, value, position, 0.4)

    seen = position[:, :, None] <= torch.arange(length)[:, None]
    seen = seen.repeat_interleave(groups, dim=1)
    keys, values = (x.double().repeat_interleave(groups, dim=1) for x in (key, value))
    logits = (query.double() @ keys.mT * 0.4).masked_fill(~seen, -torch.inf)
    expected = (logits.softmax(-1).nan_to_num(0.0) @ values).transpose(1, 2)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    assert (expected == 0).any()  # some queries come before all entries
