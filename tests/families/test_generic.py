"""Models that no family names, and what it takes to add one."""

import inspect
import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from purekv import PureKV, PureKVConfig, PureKVError, families
from purekv.families import FAMILIES, GENERIC
from purekv.layout import Layout, VisualSpan
from purekv.scoring import Attended
from purekv.scoring.frame_difference import FrameDifference
from purekv.scoring.infinipot_v import InfiniPotV
from tests.families.zoo import UNKNOWN, ZOO, text_config

STEPS = 3
LOGITS = {
    "max_new_tokens": STEPS,
    "do_sample": False,
    "output_logits": True,
    "return_dict_in_generate": True,
}


@pytest.mark.parametrize("first_token", ["exact", "compressed"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llava", "paligemma"])
def test_an_unknown_model_with_image_tokens(name, attention, first_token):
    """Also one whose prompts are not attended to causally."""
    zoo, model = UNKNOWN[name], UNKNOWN[name].model(attention)
    assert families.for_config(model.config) is GENERIC
    inputs = zoo.prompt("image", [0, 1, 2])
    bare = model.generate(**inputs, **LOGITS)
    with PureKV(PureKVConfig(budget=1.0))(model) as run:
        ours = model.generate(**inputs, **LOGITS)
    for step, other in zip(ours.logits, bare.logits, strict=True):
        torch.testing.assert_close(step, other, rtol=0, atol=0)
    with PureKV(PureKVConfig(budget=0.3, first_token=first_token))(model) as run:
        together = model.generate(**inputs, **LOGITS)
        assert run.report.kv_bytes_kept < run.report.kv_bytes_full
        alone = [model.generate(**zoo.prompt("image", [row]), **LOGITS) for row in range(3)]
    for row, answer in enumerate(alone):
        for step, other in zip(answer.logits, together.logits, strict=True):
            torch.testing.assert_close(step[0], other[row], rtol=1e-3, atol=1e-4)
    again = model.generate(**inputs, **LOGITS)
    assert torch.equal(again.sequences, bare.sequences)


@pytest.mark.parametrize("settings", [{"evict": "active"}, {"evict": "drop"}], ids=str)
def test_what_needs_a_causal_mask_is_refused(settings):
    with pytest.raises(PureKVError, match="evict='post'"):
        PureKV(PureKVConfig(**settings))(UNKNOWN["llava"].model())


def test_the_message_says_what_to_implement():
    config = SimpleNamespace(model_type="brand_new", sub_configs={"vision_config": object})
    with pytest.raises(PureKVError, match=r"'brand_new'.*language_model.*placeholders.*__init__"):
        families.for_config(config)
    with pytest.raises(PureKVError, match=r"model\.thinker"):
        families.for_config(SimpleNamespace(model_type="qwen2_5_omni"))


def test_a_decoder_that_is_not_found(monkeypatch):
    model = UNKNOWN["llava"].model()
    model.config.text_config.num_hidden_layers = 7
    with pytest.raises(PureKVError, match=r"no decoder of 7 `layers`"):
        PureKV()(model)


def test_layers_that_all_slide():
    config = MistralConfig(**text_config(sliding_window=8))
    with pytest.raises(PureKVError, match="sliding_attention are not supported"):
        PureKV(PureKVConfig(scope="prompt"))(MistralForCausalLM(config))


@pytest.mark.parametrize("name", ["gemma3"])
@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"evict": "active"}, "sliding-window.*evict='post'"),
        ({"evict": "drop"}, "sliding-window.*evict='post'"),
        ({"first_token": "compressed"}, "first_token='exact'"),
        ({"prefill": "spatiotemporal"}, "prefill='dense'"),
        ({"source_layers": (0,)}, r"choose among \(1, 3\)"),
    ],
    ids=str,
)
def test_what_sliding_layers_cannot_do(name, settings, names):
    with pytest.raises(PureKVError, match=names):
        PureKV(PureKVConfig(**settings))(ZOO[name].model())


def test_only_global_layers_of_gemma_evict():
    zoo, model = ZOO["gemma3"], ZOO["gemma3"].model()
    with PureKV(PureKVConfig(budget=0.3))(model) as run:
        model.generate(**zoo.prompt("images", [1]), max_new_tokens=2)
    report = run.report
    assert report.prefill_per_layer == ["sliding", "dense"] * 2
    assert report.source_layers == [1, 3]  # below the first source, a layer scores itself
    assert report.kept_per_layer == [6, report.kept_per_layer[1]] * 2  # the window less one
    assert report.kept_per_layer[1] == report.text_tokens[0] + report.kept_visual_tokens[0]


@pytest.mark.parametrize("name", ["expected_attention"])
def test_an_unknown_rotation(name):
    with pytest.raises(PureKVError, match="rotates is not known"):
        PureKV(PureKVConfig(scorer=name))(ZOO["glm4v"].model())


def test_deepstack_features_are_not_dropped():
    zoo, model = ZOO["qwen3_vl"], ZOO["qwen3_vl"].model()
    with pytest.raises(PureKVError, match="source_layers of 1 or more"):
        PureKV(PureKVConfig(evict="drop", source_layers=(0,)))(model)
    with pytest.raises(PureKVError, match="source_layers of 1 or more"):
        PureKV(PureKVConfig(evict="drop", scorer="frame_difference"))(model)
    config = PureKVConfig(budget=0.3, evict="drop", source_layers=(1,))
    with PureKV(config)(model) as run:
        together = model.generate(**zoo.prompt("mixed", [0, 1, 2]), **LOGITS)
        computed = run.report.computed_per_layer
        alone = [model.generate(**zoo.prompt("mixed", [row]), **LOGITS) for row in range(3)]
    assert computed[0] == computed[1] > computed[2]
    for row, answer in enumerate(alone):
        for step, other in zip(answer.logits, together.logits, strict=True):
            torch.testing.assert_close(step[0], other[row], rtol=1e-3, atol=1e-4)


def test_a_family_is_a_short_file():
    for family in set(FAMILIES.values()):
        module = sys.modules[type(family).__module__]
        assert len(inspect.getsource(module).splitlines()) < 120


@pytest.mark.parametrize("scorer", ["infinipot_v", "frame_difference"])
def test_frames_are_compared_across_their_time_stamps(scorer):
    """With text between frames and without, the same frames get the same scores."""
    torch.manual_seed(0)
    apart = [VisualSpan(4 + 6 * n, (1, 2, 2), "video", n > 0) for n in range(3)]
    together = [VisualSpan(4, (3, 2, 2), "video")]
    key, value = torch.randn(2, 1, 2, 24, 8)
    where = torch.cat([torch.arange(span.start, span.stop) for span in apart])

    def scores(spans: list[VisualSpan], key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        layout = Layout.build(torch.ones(key.shape[0], key.shape[2], dtype=torch.bool), [spans])
        if scorer == "frame_difference":
            return FrameDifference().score_embeddings(key[:, 0], layout)[0][layout.is_visual[0]]
        attended = Attended(0, key, key, value, 1.0)
        inputs = attended.for_scorers(layout, None, None)
        return InfiniPotV(4).score(inputs, None)[0][:, layout.is_visual[0]]

    packed = [x.clone() for x in (key, value)]
    for moved, original in zip(packed, (key, value), strict=True):
        moved[:, :, 4:16] = original[:, :, where]
    torch.testing.assert_close(scores(apart, key, value), scores(together, *packed))
