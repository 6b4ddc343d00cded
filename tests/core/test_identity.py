"""A budget of everything changes nothing, and leaving the block leaves nothing behind."""

import contextlib
import copy

import pytest
import torch
from transformers import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from purekv import PureKV, PureKVConfig, PureKVError
from purekv.allocation import ALLOCATIONS
from tests.core.prompts import MODALITIES, prompt
from tests.tiny import tiny_model


@pytest.mark.parametrize("first_token", ["exact", "compressed"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("modality", MODALITIES)
@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_budget_one_gives_the_bare_models_tokens_and_logits(
    allocation, modality, attention, batch, first_token
):
    model = tiny_model()
    model.set_attn_implementation(attention)
    inputs = prompt(modality, batch)
    settings = {
        "max_new_tokens": 8,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    bare = model.generate(**inputs, **settings)
    config = PureKVConfig(budget=1.0, first_token=first_token, allocation=allocation)
    with PureKV(config)(model) as run:
        ours = model.generate(**inputs, **settings)
    assert torch.equal(ours.sequences, bare.sequences)
    for ours_step, bare_step in zip(ours.logits, bare.logits, strict=True):
        torch.testing.assert_close(ours_step, bare_step, rtol=0, atol=0)
    assert run.report.compression == 1.0


@pytest.mark.parametrize(
    ("budget", "batch", "plain"), [(1.0, 1, True), (1.0, 3, False), (0.5, 1, False)]
)
def test_layers_go_straight_to_the_model_where_nothing_changes(budget, batch, plain):
    model = tiny_model()
    inputs = prompt("mixed", batch)
    assert bool(inputs["attention_mask"].all()) == (batch == 1)
    with PureKV(PureKVConfig(budget=budget))(model) as run, torch.no_grad():
        model(**inputs)
        assert run._plain == plain
    assert run.report.prefill_per_layer == ["dense"] * 3
    assert run.report.computed_per_layer == [inputs["input_ids"].shape[1]] * 3


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_as_before_after_the_block(attention, fails):
    model = tiny_model()
    model.set_attn_implementation(attention)

    def snapshot():
        hooks = {
            name: [dict(getattr(module, kind)) for kind in vars(module) if kind.endswith("hooks")]
            for name, module in model.named_modules()
        }
        implementations = [
            module.config._attn_implementation
            for module in model.modules()
            if hasattr(module, "config")
        ]
        attributes = {name: sorted(vars(module)) for name, module in model.named_modules()}
        names = sorted(ALL_ATTENTION_FUNCTIONS.valid_keys())
        return copy.deepcopy((hooks, implementations, attributes, names, model.config.to_dict()))

    before = snapshot()
    with contextlib.suppress(ZeroDivisionError), PureKV(PureKVConfig())(model):
        model.generate(**prompt(), max_new_tokens=2)
        if fails:
            raise ZeroDivisionError
    assert snapshot() == before


def test_requests_do_not_feel_each_other():
    model = tiny_model()
    first, second = prompt(seed=1), prompt("mixed", seed=2)
    with PureKV(PureKVConfig())(model):
        expected = model.generate(**second, max_new_tokens=8, do_sample=False)
    with PureKV(PureKVConfig())(model):
        model.generate(**first, max_new_tokens=8, do_sample=False)
        with pytest.raises(PureKVError, match="no visual tokens"):
            model.generate(input_ids=torch.tensor([[1, 2, 3]]), max_new_tokens=2)
        again = model.generate(**second, max_new_tokens=8, do_sample=False)
    assert torch.equal(again, expected)


def test_without_a_cache_the_model_is_dense():
    model = tiny_model()
    inputs = prompt(batch=3)
    bare = model.generate(**inputs, max_new_tokens=4, do_sample=False, use_cache=False)
    with PureKV(PureKVConfig())(model) as run:
        ours = model.generate(**inputs, max_new_tokens=4, do_sample=False, use_cache=False)
    assert torch.equal(ours, bare)
    with pytest.raises(PureKVError, match="nothing was compressed"):
        _ = run.report


def test_an_empty_cache_is_taken_by_name_and_by_place():
    """Also where it is falsy, as an empty one is, and comes as a positional argument."""
    model = tiny_model()
    inputs = prompt()
    ids, mask = inputs.pop("input_ids"), inputs.pop("attention_mask")
    with PureKV(PureKVConfig(budget=0.3))(model), torch.no_grad():
        caches = DynamicCache(), DynamicCache()
        model.model(ids, mask, None, caches[0], **inputs)
        model.model(input_ids=ids, attention_mask=mask, past_key_values=caches[1], **inputs)
    for ours, theirs in zip(caches[0].layers, caches[1].layers, strict=True):
        assert ours.physical_length < ids.shape[1]
        assert torch.equal(ours.keys, theirs.keys)


def test_two_blocks_on_one_model_are_refused():
    model = tiny_model()
    with PureKV()(model), pytest.raises(PureKVError, match="another PureKV block"):
        PureKV()(model)
    runs = PureKV()(model), PureKV()(model)
    with runs[0], pytest.raises(PureKVError, match="another PureKV block"), runs[1]:
        pass
