"""Fewer tokens go in, and a share of all of them is kept of those."""

import pytest
import torch

from purekv import PureKV, PureKVConfig, PureKVError
from tests.core.prompts import MODALITIES, prompt
from tests.families.zoo import ZOO
from tests.tiny import tiny_model

SETTINGS = {
    "max_new_tokens": 6,
    "min_new_tokens": 6,
    "do_sample": False,
    "output_logits": True,
    "return_dict_in_generate": True,
}


def generate(inputs, **config):
    model = tiny_model()
    with PureKV(PureKVConfig(**config))(model) as run:
        output = model.generate(**inputs, **SETTINGS)
    return output, run.report


@pytest.mark.parametrize("first_token", ["exact", "compressed"])
@pytest.mark.parametrize("modality", MODALITIES)
@pytest.mark.parametrize("batch", [1, 3])
def test_to_keep_all_that_goes_in_is_to_drop_before_the_layers(batch, modality, first_token):
    inputs = prompt(modality, batch)
    pruned, report = generate(inputs, budget=0.5, prune=0.5, first_token=first_token)
    dropped, dropping = generate(
        inputs, budget=0.5, scorer="frame_difference", evict="drop", first_token=first_token
    )
    assert torch.equal(pruned.sequences, dropped.sequences)
    for ours, theirs in zip(pruned.logits, dropped.logits, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert report.kept_per_layer == dropping.kept_per_layer
    assert report.computed_per_layer == dropping.computed_per_layer
    assert report.kv_bytes_full == dropping.kv_bytes_full


@pytest.mark.parametrize("scorer", ["clie", "clie_rare", "snapkv", "h2o", "streaming"])
def test_the_first_token_has_seen_all_that_went_in(scorer):
    inputs = prompt("video", 2)
    pruned, report = generate(inputs, budget=0.2, prune=0.6, scorer=scorer)
    dropped, dropping = generate(inputs, budget=0.6, scorer="frame_difference", evict="drop")
    torch.testing.assert_close(pruned.logits[0], dropped.logits[0], rtol=0, atol=0)
    assert report.computed_per_layer == dropping.computed_per_layer
    assert max(report.kept_per_layer) < min(dropping.kept_per_layer)
    assert report.kv_bytes_kept < dropping.kv_bytes_kept < report.kv_bytes_full


@pytest.mark.parametrize("first_token", ["exact", "compressed"])
@pytest.mark.parametrize("allocation", ["uniform", "ada"])
def test_a_padded_row_is_answered_like_one_alone(allocation, first_token):
    config = {"budget": 0.3, "prune": 0.6, "allocation": allocation, "first_token": first_token}
    together, _ = generate(prompt("video", 3), **config)
    for row in range(3):
        alone, _ = generate(prompt("video", 3, rows=[row]), **config)
        for ours, theirs in zip(together.logits, alone.logits, strict=True):
            torch.testing.assert_close(ours[row], theirs[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("config", "fix"),
    [
        ({"prune": 0.4, "budget": 0.5}, "lower the budget"),
        ({"prune": 1.5}, "such as 0.4"),
        ({"prune": 4}, "such as 0.4"),
        ({"prune": 0.4, "evict": "drop"}, "evict='post'"),
        ({"prune": 0.4, "prefill": "spatiotemporal"}, "prefill='dense'"),
        ({"prune": 0.4, "scope": "prompt"}, "scope='visual'"),
        ({"prune": 0.4, "scorer": "infinipot_v"}, "another scorer"),
    ],
)
def test_what_does_not_go_with_it(config, fix):
    with pytest.raises(PureKVError, match=fix):
        PureKVConfig(**config)


@pytest.mark.parametrize("family", ["qwen3_vl", "gemma3"])
def test_models_that_need_every_token(family):
    with pytest.raises(PureKVError, match="prune"):
        PureKV(PureKVConfig(prune=0.4))(ZOO[family].model())
