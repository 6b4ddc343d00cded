"""Gemma 3 against a twin on a full cache whose global layers may not look at what was evicted."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from purekv import PureKV, PureKVConfig
from purekv.upstream import masks_like, no_masks
from tests.core.twin import Kept, recorded_selections
from tests.families.zoo import ZOO, words

LOGITS = {
    "max_new_tokens": 12,  # beyond the window of 7
    "do_sample": False,
    "output_logits": True,
    "return_dict_in_generate": True,
}
GLOBAL = (1, 3)


@contextmanager
def gemma_twin(model: Any, seq_len: int, kept: Kept) -> Iterator[None]:
    """Within the block, `model` attends by its own masks, less what global layers forgot."""

    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **_: Any
    ) -> tuple[Tensor, None]:
        batch, heads, q_len, _ = query.shape
        kv_heads, kv_len = key.shape[1:3]
        if mask is None:
            mask = torch.ones(q_len, kv_len, dtype=torch.bool).tril(kv_len - q_len)
        mask = mask.expand(batch, kv_heads, q_len, kv_len).clone()
        if module.layer_idx in GLOBAL and kv_len > q_len:  # behind the prefill
            layer = kept[GLOBAL.index(module.layer_idx)]
            for row in range(batch):
                for head in range(kv_heads):
                    gone = torch.ones(seq_len, dtype=torch.bool)
                    gone[layer[row][head]] = False
                    mask[row, head, :, :seq_len] &= ~gone
        key, value, mask = (x.repeat_interleave(heads // kv_heads, 1) for x in (key, value, mask))
        logits = query @ key.transpose(-1, -2) * scaling
        weights = logits.masked_fill(~mask, -1e30).softmax(-1)
        return (weights @ value).transpose(1, 2).contiguous(), None

    config = model.config.text_config
    before = config._attn_implementation
    ALL_ATTENTION_FUNCTIONS["gemma_twin"] = attend
    masks_like("sdpa", "gemma_twin")
    config._attn_implementation = "gemma_twin"
    try:
        yield
    finally:
        config._attn_implementation = before
        no_masks("gemma_twin")
        del ALL_ATTENTION_FUNCTIONS["gemma_twin"]


@pytest.mark.parametrize(
    ("allocation", "attention"),
    [("uniform", "sdpa"), ("uniform", "eager"), ("ada", "sdpa"), ("pyramid", "eager")],
)
@pytest.mark.parametrize("scope", ["visual", "prompt"])
@pytest.mark.parametrize("rows", [[1], [0, 1, 2]], ids=str)
def test_two_turns_equal_the_masked_twin(monkeypatch, rows, scope, allocation, attention):
    """An answer, then a further question of several tokens, on padded rows too."""
    zoo, model = ZOO["gemma3"], ZOO["gemma3"].model(attention)
    inputs = zoo.prompt("images", rows, text=30)
    question = torch.tensor(words(torch.Generator().manual_seed(9), 5)).expand(len(rows), -1)

    def two_turns() -> list[Tensor]:
        first = model.generate(**inputs, **LOGITS)
        ids = torch.cat([first.sequences, question], dim=1)
        more = ids.shape[1] - inputs["input_ids"].shape[1]
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, more), value=1)
        second = model.generate(
            input_ids=ids, attention_mask=mask, past_key_values=first.past_key_values, **LOGITS
        )
        return [*first.logits, *second.logits]

    config = PureKVConfig(budget=0.3, scope=scope, allocation=allocation)
    with recorded_selections(monkeypatch) as kept, PureKV(config)(model) as run:
        ours = two_turns()
        assert run.report.compression > 1
    full = two_turns()
    with gemma_twin(model, inputs["input_ids"].shape[1], kept):
        twin = two_turns()
    for step, other in zip(ours, twin, strict=True):
        torch.testing.assert_close(step, other, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(ours[-1], full[-1], rtol=1e-3, atol=1e-4)


def test_expected_attention_has_the_angles_of_global_layers():
    zoo, model = ZOO["gemma3"], ZOO["gemma3"].model()
    with PureKV(PureKVConfig(budget=0.3, scorer="expected_attention"))(model) as run:
        model.generate(**zoo.prompt("images", [1]), max_new_tokens=2)
    assert run.report.compression > 1
