"""Requests that cannot be served: one line that names the fix, before the work."""

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import Cache, DynamicLayer

from purekv import PureKV, PureKVConfig, PureKVError
from purekv.evals import SharedPrefill
from tests.core.prompts import prompt
from tests.tiny import tiny_model


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"budget": 0}, "share in"),
        ({"budget": 0.0}, "share in"),
        ({"budget": 1.5}, "share in"),
        ({"budget": -3}, "share in"),
        ({"budget": "abc"}, "not a number"),
        ({"budget": float("nan")}, "share in"),
        ({"budget": True}, "not a number"),
        ({"budget": 1}, "1.0"),
        ({"scorer": "clei"}, "clie"),
        ({"window": 0}, "question"),
        ({"window": "answer"}, "question"),
        ({"source_layers": (3, 2)}, "ascending"),
        ({"source_layers": ()}, "auto"),
        ({"source_layers": (-1,)}, "auto"),
        ({"allocation": "adakv"}, "ada"),
        ({"prefill": "sparse"}, "dense"),
        ({"evict": "early"}, "active"),
        ({"first_token": "none"}, "exact"),
        ({"plan": "plan.json"}, "plan not found"),
        ({"layer_shares": (1.0, -1.0)}, "0 or more"),
        ({"layer_shares": (1.0, 2.0), "allocation": "pyramid"}, "use one of them"),
    ],
    ids=str,
)
def test_a_bad_setting_is_one_line_that_names_the_fix(settings, names):
    with pytest.raises(PureKVError, match=names) as error:
        PureKVConfig(**settings)
    assert "\n" not in str(error.value)


def test_settings_survive_json():
    config = PureKVConfig(
        budget=64, source_layers=(0, 2), window=16, first_token="compressed", allocation="ada"
    )
    assert PureKVConfig.from_json(config.to_json()) == config
    assert isinstance(PureKVConfig.from_json(PureKVConfig(budget=1.0).to_json()).budget, float)
    with pytest.raises(PureKVError, match="unknown setting 'budgets'"):
        PureKVConfig.from_dict({"budgets": 0.2})


def test_a_source_layer_out_of_range():
    with pytest.raises(PureKVError, match="layers are 0 to 2"):
        PureKV(PureKVConfig(source_layers=(1, 7)))(tiny_model())


def test_an_unsupported_attention():
    model = tiny_model()
    model.config.text_config._attn_implementation = "flex_attention"
    with pytest.raises(PureKVError, match=r"flex_attention.*sdpa"):
        PureKV()(model)


@pytest.mark.parametrize("attention", ["flash_attention_2", "flash_attention_3"])
def test_flash_attention_cannot_mask_each_head(attention):
    model = tiny_model()
    model.config.text_config._attn_implementation = attention
    PureKV(PureKVConfig(allocation="pyramid"))(model)
    with pytest.raises(PureKVError, match=r'ada.*attn_implementation="sdpa"'):
        PureKV(PureKVConfig(allocation="ada"))(model)
    with pytest.raises(PureKVError, match=r'ada.*attn_implementation="sdpa"'):
        SharedPrefill([PureKVConfig(allocation="ada")], model)


class QuantizedLayer(DynamicLayer):
    """Stands for any layer that stores something else than plain keys and values."""


def test_unsupported_caches():
    model = tiny_model()
    inputs = prompt()
    with PureKV()(model):
        with pytest.raises(PureKVError, match=r"StaticCache.*DynamicCache"):
            model.generate(**inputs, max_new_tokens=2, cache_implementation="static")
        static = StaticCache(model.config.text_config, max_cache_len=64)
        with pytest.raises(PureKVError, match=r"StaticCache.*DynamicCache"):
            model(**inputs, past_key_values=static)
        quantized = Cache(layers=[QuantizedLayer() for _ in range(3)])
        with pytest.raises(PureKVError, match=r"QuantizedLayer.*DynamicCache"):
            model(**inputs, past_key_values=quantized)


def test_a_cache_that_another_prefill_filled():
    model = tiny_model()
    cache = DynamicCache()
    with torch.no_grad():
        model(**prompt(), past_key_values=cache)
    with PureKV()(model), pytest.raises(PureKVError, match="not filled by PureKV"):
        model(input_ids=torch.tensor([[5]]), past_key_values=cache)


def test_a_text_only_prompt():
    model = tiny_model()
    with PureKV()(model), pytest.raises(PureKVError, match="no visual tokens"):
        model.generate(input_ids=torch.tensor([[1, 2, 3]]), max_new_tokens=2)


def test_no_question_behind_the_video():
    model = tiny_model()
    inputs = prompt()
    last = int((inputs["input_ids"][0] == model.config.video_token_id).nonzero()[-1])
    for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
        inputs[name] = inputs[name][:, : last + 1]
    with PureKV()(model), pytest.raises(PureKVError, match="window=N"):
        model.generate(**inputs, max_new_tokens=2)
    config = PureKVConfig(window=4, first_token="compressed")
    with PureKV(config)(model), pytest.raises(PureKVError, match='first_token="exact"'):
        model.generate(**inputs, max_new_tokens=2)
    with PureKV(PureKVConfig(window=4))(model) as run:
        model.generate(**inputs, max_new_tokens=2)
    assert run.report.compression > 1


def test_a_count_above_the_visual_tokens():
    model = tiny_model()
    with PureKV(PureKVConfig(budget=500))(model), pytest.raises(PureKVError, match="18 visual"):
        model.generate(**prompt(), max_new_tokens=2)


def test_pixels_sent_again():
    model = tiny_model()
    inputs = prompt()
    with PureKV()(model):
        first = model.generate(**inputs, max_new_tokens=3, return_dict_in_generate=True)
        longer = dict(inputs)
        longer["input_ids"] = torch.cat([first.sequences, torch.tensor([[7, 8]])], dim=1)
        longer["attention_mask"] = torch.ones_like(longer["input_ids"])
        longer["mm_token_type_ids"] = torch.nn.functional.pad(
            inputs["mm_token_type_ids"],
            (0, longer["input_ids"].shape[1] - inputs["input_ids"].shape[1]),
        )
        with pytest.raises(PureKVError, match="follow-up turn"):
            model.generate(**longer, past_key_values=first.past_key_values, max_new_tokens=2)


def test_ids_that_do_not_fit_the_grids():
    model = tiny_model()
    inputs = prompt()
    inputs["video_grid_thw"] = inputs["video_grid_thw"] * torch.tensor([2, 1, 1])
    with PureKV()(model), pytest.raises(PureKVError, match="video tokens"):
        model(**inputs)
