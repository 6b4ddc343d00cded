"""The bench on a model of tiny shapes: what its rows say, never how fast they are."""

import copy
import json

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from purekv import PureKVConfig, PureKVError
from purekv.bench import (
    FIRST_TOKENS,
    KEYS,
    PARTS,
    Plan,
    Workload,
    ablate,
    baselines,
    measure,
    measure_prompt,
    phases,
    random_inputs,
    random_model,
    suite,
    why_not,
)
from purekv.bench.shapes import frame_grid
from purekv.bench.stopwatch import Laps, Stopwatch

CONTRACT = {
    "what", "tokens", "batch", "prefill", "evict", "scorer", "budget", "plan", "ms", "tok_s",
    "peak_bytes", "kv_bytes", "baseline", "speedup",
}  # fmt: skip
CONFIGS = (PureKVConfig(budget=0.2), PureKVConfig(budget=0.5, scorer="snapkv"))
TOKENS, BATCH = 100, 2


@pytest.fixture(scope="module")
def model():
    return random_model("tiny", torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module")
def workload(model):
    return Workload.prepare(model, random_inputs(model.config, TOKENS), BATCH)


@pytest.fixture(scope="module")
def rows(workload):
    return measure(workload, Plan(CONFIGS, repeats=3, decode_tokens=2))


def of(rows, what, **values):
    return [
        row
        for row in rows
        if row["what"] == what and all(row[name] == value for name, value in values.items())
    ]


def test_every_row_has_the_contract_keys(rows) -> None:
    for row in rows:
        assert row.keys() >= CONTRACT
        assert row.keys() >= set(KEYS)
        assert (row["tokens"], row["batch"]) == (TOKENS, BATCH)
        if row["skipped"] is None:
            assert 0 < row["ms_min"] <= row["ms"] <= row["ms_max"]
            assert row["repeats"] == 3
            assert row["peak_bytes"] > 0
    json.dumps(rows)


@pytest.mark.parametrize("what", ["lm_prefill", "ttft", "decode"])
def test_dense_baselines_then_each_method_over_those_that_ran(rows, what) -> None:
    dense = of(rows, what, scorer=None)
    assert [row["baseline"] for row in dense] == ["sdpa", "flash", "eager"]
    assert [row["speedup"] for row in dense] == [1.0, None, 1.0]
    for config in CONFIGS:
        ours = of(rows, what, scorer=config.scorer, budget=config.budget)
        assert [row["baseline"] for row in ours] == ["sdpa", "eager"]
        assert all(row["speedup"] > 0 for row in ours)
        assert ours[0]["ms"] == ours[1]["ms"]


def test_bytes_of_the_cache(rows, workload) -> None:
    full = of(rows, "lm_prefill", baseline="sdpa", scorer=None)[0]["kv_bytes"]
    text = workload.model.config.get_text_config()
    head = text.hidden_size // text.num_attention_heads
    entry = 2 * text.num_hidden_layers * text.num_key_value_heads * head * 4 * BATCH
    assert full == workload.prompt_tokens * entry
    for config in CONFIGS:
        kept = full - int((1 - config.budget) * TOKENS) * entry
        for row in of(rows, "decode", scorer=config.scorer):
            assert row["kv_bytes"] == kept
        for row in of(rows, "overhead", scorer=config.scorer):
            assert kept <= row["kv_bytes_peak"] < full


def test_tokens_a_second_count_all_rows_of_the_batch(rows) -> None:
    for row in of(rows, "decode", skipped=None):
        assert row["tok_s"] == pytest.approx(BATCH * 1000 / row["ms"])
    assert all(row["tok_s"] is None for row in rows if row["what"] != "decode")


def test_parts_of_the_ablation_sum_to_its_total(rows) -> None:
    for config in CONFIGS:
        found = of(rows, "overhead", scorer=config.scorer)
        assert [row["first_token"] for row in found] == list(FIRST_TOKENS)
        for row in found:
            assert row["parts"].keys() == PARTS.keys()
            assert sum(row["parts"].values()) == pytest.approx(row["ms"])
            assert row["share"] > 0
            named = {name: ms for name, ms in row["parts"].items() if name != "other"}
            assert all(ms >= 0 for ms in named.values())
            # What has a name is nearly all of it.
            assert sum(named.values()) > 0.5 * row["ms"]
        exact, compressed = (row["parts"] for row in found)
        assert exact["tail_rerun"] == 0 < compressed["tail_rerun"]


def test_scoring_is_told_apart_by_where_it_observes(workload) -> None:
    one_source = ablate(workload, PureKVConfig(source_layers=(0,))).parts
    assert one_source["scoring_source"] > 0 < one_source["scoring_elsewhere"]
    everywhere = ablate(workload, PureKVConfig(scorer="snapkv")).parts
    assert everywhere["scoring_source"] > 0 == everywhere["scoring_elsewhere"]
    nowhere = ablate(workload, PureKVConfig(scorer="h2o")).parts
    assert nowhere["scoring_source"] == 0 < nowhere["scoring_elsewhere"]


@pytest.mark.parametrize("scorer", ["clie", "frame_difference"])
def test_dropping_is_a_part_of_its_own(workload, scorer) -> None:
    config = PureKVConfig(scorer=scorer, evict="drop", first_token="compressed")
    parts = ablate(workload, config).parts
    assert parts["dropping"] > 0
    assert all(ms >= 0 for name, ms in parts.items() if name != "other")
    post = ablate(workload, PureKVConfig()).parts
    assert post["dropping"] == 0


def test_the_ablation_adds_no_more_than_its_timers(workload) -> None:
    """Its own time is a part of the prefill that it timed."""
    ablation = ablate(workload, PureKVConfig(first_token="compressed"))
    assert 0 < ablation.ms < ablation.whole.ms


def test_the_model_is_left_as_it_was(model) -> None:
    def state():
        hooks = [
            (name, len(m._forward_pre_hooks), len(m._forward_hooks), sorted(vars(m)))
            for name, m in model.named_modules()
        ]
        language = model.model.language_model.config
        return hooks, language._attn_implementation, sorted(ALL_ATTENTION_FUNCTIONS)

    model.model.rope_deltas = marker = torch.tensor([[7]])
    before, weights = state(), copy.deepcopy(model.state_dict())
    plan = Plan(CONFIGS, repeats=1, decode_tokens=1)
    measure_prompt(model, random_inputs(model.config, 50), 1, plan)
    assert state() == before
    assert model.model.rope_deltas is marker
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())
    model.model.rope_deltas = None


def test_decoding_goes_on_where_generate_would(model) -> None:
    inputs = random_inputs(model.config, 64)
    workload = Workload.prepare(model, inputs)
    seen = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["position_ids"]), with_kwargs=True
    )
    try:
        with torch.inference_mode():
            measure(workload, Plan((), ("sdpa",), ("decode",), repeats=1, decode_tokens=2))
            ours = seen[-2:]
            model.generate(**inputs, max_new_tokens=3, do_sample=False, eos_token_id=None)
    finally:
        hook.remove()
        model.model.rope_deltas = None
    for step, expected in zip(ours, seen[-2:], strict=True):
        assert torch.equal(step[-3:], expected[-3:])


def test_only_the_phases_asked_for(workload) -> None:
    plan = Plan(CONFIGS[:1], ("eager",), ("overhead",), repeats=1)
    rows = measure(workload, plan)
    assert {row["what"] for row in rows} == {"overhead"}
    assert plan.baselines == ("sdpa", "eager")  # overhead is a share of the default
    rows = measure(workload, Plan(CONFIGS[:1], ("sdpa",), ("vision", "ttft"), repeats=1))
    assert [row["what"] for row in rows] == ["vision", "ttft", "ttft"]


class TestSkipping:
    def test_flash_without_cuda(self, rows) -> None:
        for row in of(rows, "lm_prefill", baseline="flash"):
            assert "CUDA" in row["skipped"]
            assert row["ms"] is row["speedup"] is None

    def test_eager_scores_that_would_not_fit(self, workload, monkeypatch) -> None:
        needed = baselines.eager_bytes(workload)
        heads, length = 4, workload.prompt_tokens
        assert needed >= BATCH * heads * length**2 * 8
        assert why_not(workload, "eager") is None
        monkeypatch.setattr(baselines, "free_bytes", lambda device: needed)

        def unused(*args: object) -> None:
            raise AssertionError("eager attention was tried")

        eager = phases.prefill

        def no_eager(workload, cache):
            if workload.model.model.language_model.config._attn_implementation == "eager":
                unused()
            return eager(workload, cache)

        monkeypatch.setattr(phases, "prefill", no_eager)
        rows = measure(workload, Plan(CONFIGS[:1], ("eager",), ("lm_prefill",), repeats=1))
        reason = of(rows, "lm_prefill", scorer=None, baseline="eager")[0]["skipped"]
        assert "GiB" in reason
        assert [row["baseline"] for row in of(rows, "lm_prefill", scorer="clie")] == ["sdpa"]

    def test_out_of_memory_of_one_run_is_a_row(self, workload, monkeypatch) -> None:
        prefill = phases.prefill

        def small(workload, cache):
            name = workload.model.model.language_model.config._attn_implementation
            if name == "sdpa":
                raise torch.OutOfMemoryError("too much")
            return prefill(workload, cache)

        monkeypatch.setattr(phases, "prefill", small)
        rows = measure(workload, Plan(CONFIGS[:1], ("sdpa",), ("lm_prefill",), repeats=1))
        dense, ours = rows
        assert dense["skipped"] == suite.OUT_OF_MEMORY
        assert ours["ms"] > 0
        assert ours["speedup"] is ours["baseline"] is None

    def test_out_of_memory_of_a_prompt_is_a_row(self, model, monkeypatch) -> None:
        def too_much(*args: object) -> None:
            raise torch.OutOfMemoryError("too much")

        monkeypatch.setattr(Workload, "prepare", too_much)
        (row,) = measure_prompt(model, random_inputs(model.config, 50), 3, Plan(CONFIGS))
        assert (row["tokens"], row["batch"]) == (49, 3)
        assert row["skipped"] == suite.OUT_OF_MEMORY


@pytest.mark.parametrize(
    ("tokens", "grid"), [(1, (1, 1)), (100, (1, 10)), (500, (2, 16)), (1000, (4, 16))], ids=str
)
def test_prompts_are_about_as_long_as_asked(model, tokens, grid) -> None:
    frames, side = frame_grid(tokens)
    assert (frames, side) == grid
    ids = random_inputs(model.config, tokens)["input_ids"]
    assert int((ids == model.config.video_token_id).sum()) == frames * side**2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"baselines": ("fast",)}, "sdpa, flash, eager"),
        ({"phases": ("sleep",)}, "lm_prefill"),
        ({"repeats": 0}, "repeats=0"),
        ({"decode_tokens": 0}, "decode_tokens=0"),
    ],
    ids=str,
)
def test_plans_that_make_no_sense(settings, message) -> None:
    with pytest.raises(PureKVError, match=message):
        Plan(CONFIGS, **settings)


def test_laps_add_up_and_nest() -> None:
    laps = Laps(torch.device("cpu"))
    work = laps.around("inner", lambda size: torch.ones(size, size).sum())
    with laps("outer"):
        assert work(50) == 2500
        assert work(size=3) == 9
    assert set(laps.ms) == {"inner", "outer"}
    assert 0 < laps.ms["inner"] < laps.ms["outer"]


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    device = torch.device("cuda")
    with Stopwatch(device) as watch:
        torch.ones(2**20, device=device)
    assert watch.ms > 0
    assert watch.peak_bytes >= 2**22
    model = random_model("tiny", device, torch.bfloat16)
    rows = measure_prompt(
        model, random_inputs(model.config, 500), 2, Plan(CONFIGS, repeats=3, decode_tokens=2)
    )
    assert not [row["skipped"] for row in rows if row["skipped"]]
    for row in of(rows, "overhead"):
        assert sum(row["parts"].values()) == pytest.approx(row["ms"])
    assert {row["baseline"] for row in of(rows, "ttft")} == {"sdpa", "flash", "eager"}
