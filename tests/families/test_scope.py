"""`scope="prompt"`: long text is compressed, on language models and on all families."""

import pytest
import torch

from purekv import PureKV, PureKVConfig, PureKVError
from purekv.evals import SharedPrefill
from purekv.scope import SINKS, WINDOW
from tests.core.twin import recorded_selections
from tests.families.zoo import TEXT, UNKNOWN, ZOO

STEPS = 3
GREEDY = {"max_new_tokens": STEPS, "do_sample": False}
LOGITS = {**GREEDY, "output_logits": True, "return_dict_in_generate": True}
PROMPT = PureKVConfig(budget=0.3, scope="prompt")
ALL = {**TEXT, **ZOO, "granite": UNKNOWN["granite"]}


def model_of(name):
    if not ALL[name].is_present:
        pytest.skip(f"ABSENT: this transformers has no {name}")
    return ALL[name].model()


@pytest.mark.parametrize("name", ALL)
def test_long_text_is_compressed(name):
    zoo, model = ALL[name], model_of(name)
    inputs = zoo.prompt("text", [0, 1, 2], text=60)
    with PureKV(PROMPT)(model) as run:
        together = model.generate(**inputs, **LOGITS)
        report = run.report
        alone = [model.generate(**zoo.prompt("text", [n], text=60), **LOGITS) for n in range(3)]
    lengths = inputs["attention_mask"].sum(1).tolist()
    assert report.visual_tokens == [length - SINKS - WINDOW for length in lengths]
    assert report.kept_visual_tokens == [int(0.3 * count) for count in report.visual_tokens]
    assert report.kv_bytes_kept < report.kv_bytes_full
    for row, answer in enumerate(alone):
        for step, other in zip(answer.logits, together.logits, strict=True):
            torch.testing.assert_close(step[0], other[row], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ALL)
def test_a_whole_budget_changes_nothing(name):
    zoo, model = ALL[name], model_of(name)
    inputs = zoo.prompt("text", [0, 1, 2], text=60)
    bare = model.generate(**inputs, **LOGITS)
    with PureKV(PureKVConfig(budget=1.0, scope="prompt"))(model) as run:
        ours = model.generate(**inputs, **LOGITS)
    assert run.report.compression == 1.0
    for step, other in zip(ours.logits, bare.logits, strict=True):
        torch.testing.assert_close(step, other, rtol=0, atol=0)


@pytest.mark.parametrize("name", ALL)
def test_without_pixels_the_error_names_the_scope(name):
    zoo, model = ALL[name], model_of(name)
    with PureKV()(model), pytest.raises(PureKVError, match='scope="prompt"'):
        model.generate(**zoo.prompt("text", [0], text=60), **GREEDY)


@pytest.mark.parametrize("shows", ["text", "mixed"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"window": 6},
        {"scorer": "snapkv"},
        {"evict": "active"},
        {"evict": "drop"},
        {"evict": "drop", "window": 6},
    ],
    ids=str,
)
@pytest.mark.parametrize("first_token", ["exact", "compressed"])
def test_sinks_and_window_stay(monkeypatch, shows, settings, first_token):
    model, zoo = ZOO["qwen2_vl"].model(), ZOO["qwen2_vl"]
    rows = [0, 1, 2]
    inputs = zoo.prompt(shows, rows, text=60)
    config = PureKVConfig(budget=0.3, scope="prompt", first_token=first_token, **settings)
    with recorded_selections(monkeypatch) as kept, PureKV(config)(model) as run:
        together = model.generate(**inputs, **LOGITS)
        report = run.report
        alone = [model.generate(**zoo.prompt(shows, [n], text=60), **LOGITS) for n in rows]
    if "evict" not in settings:
        for row, is_token in enumerate(inputs["attention_mask"].bool()):
            first = int(is_token.nonzero()[0])
            window = int(is_token.sum()) - SINKS - report.visual_tokens[row]
            seen = 0 if first_token == "compressed" else window  # the window runs again
            for layer in kept[:3]:
                for head in layer[row]:
                    assert set(range(first, first + SINKS)) <= set(head.tolist())
                    assert len(head) == SINKS + report.kept_visual_tokens[row] + seen
    for row, answer in enumerate(alone):
        for step, other in zip(answer.logits, together.logits, strict=True):
            torch.testing.assert_close(step[0], other[row], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", [*TEXT, "qwen3_vl", "gemma3"])
def test_a_further_turn_goes_on_where_the_prompt_ended(name):
    """Also where a layer slides and where rows are padded."""
    zoo, model = ALL[name], model_of(name)
    inputs = zoo.prompt("text", [0, 1, 2], text=60)
    steps = {"do_sample": False, "return_dict_in_generate": True}
    with PureKV(PROMPT)(model):
        whole = model.generate(**inputs, **steps, max_new_tokens=8)
        half = model.generate(**inputs, **steps, max_new_tokens=4)
        mask = torch.cat([inputs["attention_mask"], torch.ones(3, 4, dtype=torch.long)], dim=1)
        rest = model.generate(
            input_ids=half.sequences, attention_mask=mask, past_key_values=half.past_key_values,
            **steps, max_new_tokens=4,
        )  # fmt: skip
    assert torch.equal(rest.sequences, whole.sequences)


def test_a_short_prompt_is_left_as_it_is():
    zoo, model = TEXT["llama"], TEXT["llama"].model()
    inputs = zoo.prompt("text", [0])
    bare = model.generate(**inputs, **GREEDY)
    with PureKV(PROMPT)(model) as run:
        assert torch.equal(model.generate(**inputs, **GREEDY), bare)
    assert run.report.visual_tokens == [0]
    assert run.report.compression == 1.0


def test_frames_cannot_score_text():
    with pytest.raises(PureKVError, match='scope="visual"'):
        PureKVConfig(scope="prompt", evict="drop", scorer="frame_difference")


def test_an_evaluation_knows_visual_tokens_only():
    with pytest.raises(PureKVError, match='scope="visual"'):
        SharedPrefill([PROMPT], ZOO["qwen2_vl"].model())
    with pytest.raises(PureKVError, match="sliding-window"):
        SharedPrefill([PureKVConfig()], ZOO["gemma3"].model())


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "internvl"])
def test_without_a_cache_nothing_is_compressed(family):
    zoo = ZOO[family]
    model, inputs = zoo.model(), zoo.prompt("video", [0])
    with PureKV(PureKVConfig(budget=0.5))(model) as run, torch.no_grad():
        model(**inputs, use_cache=False)
        with pytest.raises(PureKVError, match="nothing was compressed"):
            _ = run.report
