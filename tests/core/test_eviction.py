"""What a run keeps and what it then answers, against references that share no code with it."""

import pytest
import torch
from transformers import DynamicCache

from purekv import PureKV, PureKVConfig, PureKVError
from purekv.allocation import ALLOCATIONS
from purekv.cache import cache_bytes
from tests.core.prompts import MODALITIES, prompt
from tests.core.twin import recorded_selections, twin_attention
from tests.tiny import tiny_model

GREEDY = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}


def reference_clie(model, inputs, sources, budget):
    """Kept positions [layer][row][head] from full attention matrices, in float64."""
    ids = inputs["input_ids"]
    cache = DynamicCache()
    before = model.config.text_config._attn_implementation
    model.set_attn_implementation({"text_config": "eager"})
    with torch.no_grad():
        output = model(**inputs, past_key_values=cache, output_attentions=True)
    model.set_attn_implementation({"text_config": before})
    is_visual = (ids == model.config.image_token_id) | (ids == model.config.video_token_id)
    kept = []
    for layer_idx, layer in enumerate(cache.layers):
        at_or_below = [s for s in sources if s <= layer_idx]
        source = at_or_below[-1] if at_or_below else layer_idx
        attention = output.attentions[source].double()  # [B, Hq, S, S]
        rows = []
        for row in range(ids.shape[0]):
            visual = is_visual[row].nonzero().flatten()
            window = slice(int(visual[-1]) + 1, None)
            mean = attention[row, :, window].mean((0, 1))
            norm = layer.values[row].double().norm(dim=-1)  # [Hkv, S]
            count = int(budget * len(visual) + 1e-6) if isinstance(budget, float) else budget
            score = (mean * norm)[:, visual]
            top = visual[score.argsort(descending=True, stable=True)[:, : max(1, count)]]
            text = (inputs["attention_mask"][row].bool() & ~is_visual[row]).nonzero().flatten()
            rows.append([sorted(torch.cat([head, text]).tolist()) for head in top])
        kept.append(rows)
    return kept, cache


@pytest.mark.parametrize(
    ("sources", "budget"), [((0,), 0.2), ((1,), 0.5), ((0, 2), 0.3), ((2,), 3)]
)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("modality", MODALITIES)
def test_clie_keeps_the_top_of_the_full_attention_matrix(modality, batch, sources, budget):
    model = tiny_model()
    inputs = prompt(modality, batch)
    expected, full = reference_clie(model, inputs, sources, budget)
    cache = DynamicCache()
    with PureKV(PureKVConfig(budget=budget, source_layers=sources))(model), torch.no_grad():
        model(**inputs, past_key_values=cache)
    for layer, full_layer, rows in zip(cache.layers, full.layers, expected, strict=True):
        for row, heads in enumerate(rows):
            for head, positions in enumerate(heads):
                stored = slice(layer.keys.shape[2] - len(positions), None)
                for ours, theirs in (
                    (layer.keys, full_layer.keys),
                    (layer.values, full_layer.values),
                ):
                    torch.testing.assert_close(
                        ours[row, head, stored], theirs[row, head, positions], rtol=1e-4, atol=1e-5
                    )


@pytest.mark.parametrize("first_token", ["exact", "compressed"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("modality", MODALITIES)
@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_answers_equal_a_masked_full_cache(
    monkeypatch, allocation, modality, batch, attention, first_token
):
    model = tiny_model()
    model.set_attn_implementation(attention)
    inputs = prompt(modality, batch)
    settings = {**GREEDY, "output_logits": True, "return_dict_in_generate": True}
    config = PureKVConfig(
        budget=0.3, source_layers=(1,), first_token=first_token, allocation=allocation
    )
    with recorded_selections(monkeypatch) as kept, PureKV(config)(model):
        ours = model.generate(**inputs, **settings)
    with twin_attention(model, inputs, kept, first_token):
        twin = model.generate(**inputs, **settings)
    assert torch.equal(ours.sequences, twin.sequences)
    for ours_step, twin_step in zip(ours.logits, twin.logits, strict=True):
        torch.testing.assert_close(ours_step, twin_step, rtol=1e-3, atol=1e-4)
    full = model.generate(**inputs, **settings)
    differs = [
        not torch.allclose(a, b, atol=1e-4) for a, b in zip(ours.logits, full.logits, strict=True)
    ]
    assert differs[-1]  # the eviction is felt ...
    assert differs[0] == (first_token == "compressed")  # ... by the first token where it should be


SCORERS = ["clie", "snapkv", "value_norm", "expected_attention", "infinipot_v"]


@pytest.mark.parametrize("first_token", ["exact", "compressed"])
@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_a_padded_row_equals_the_row_alone(allocation, scorer, first_token):
    model = tiny_model()
    config = PureKVConfig(
        budget=0.25, scorer=scorer, first_token=first_token, allocation=allocation
    )
    batch = prompt("mixed", 3)
    with PureKV(config)(model):
        together = model.generate(**batch, **GREEDY)
        for row in range(3):
            alone = model.generate(**prompt("mixed", rows=[row]), **GREEDY)
            assert torch.equal(alone[0, -12:], together[row, -12:])


@pytest.mark.parametrize(
    "decoding",
    [
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 2},
        {"num_beams": 2, "do_sample": True},
        {"do_sample": True, "num_return_sequences": 2, "top_k": 20},
    ],
    ids=str,
)
@pytest.mark.parametrize("first_token", ["exact", "compressed"])
@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_every_decoding_mode_equals_the_masked_twin(monkeypatch, allocation, decoding, first_token):
    model = tiny_model()
    inputs = prompt("mixed", 3)
    copies = decoding.get("num_beams", decoding.get("num_return_sequences", 1))
    expanded = {
        name: inputs[name].repeat_interleave(copies, 0) for name in ("input_ids", "attention_mask")
    }
    settings = {**GREEDY, **decoding}
    config = PureKVConfig(budget=0.3, first_token=first_token, allocation=allocation)
    with recorded_selections(monkeypatch) as kept, PureKV(config)(model):
        torch.manual_seed(0)
        ours = model.generate(**inputs, **settings)
    torch.manual_seed(0)
    with twin_attention(model, expanded, kept, first_token):
        twin = model.generate(**inputs, **settings)
    assert torch.equal(ours, twin)


@pytest.mark.parametrize("first_token", ["exact", "compressed"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_a_follow_up_turn_continues_the_compressed_cache(
    monkeypatch, allocation, batch, first_token
):
    model = tiny_model()
    inputs = prompt("mixed", batch)
    config = PureKVConfig(budget=0.3, first_token=first_token, allocation=allocation)
    turn = torch.randint(1, 250, (batch, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(turn)
    if batch > 1:
        mask[1, :4] = 0  # a shorter second turn
    settings = {**GREEDY, "return_dict_in_generate": True, "output_logits": True}

    def chat():
        first = model.generate(**inputs, **settings)
        ids = torch.cat([first.sequences, turn], dim=1)
        before = torch.ones_like(ids)
        before[:, : inputs["input_ids"].shape[1]] = inputs["attention_mask"]
        before[:, -9:] = mask
        second = model.generate(
            input_ids=ids, attention_mask=before, past_key_values=first.past_key_values, **settings
        )
        return first, second

    with recorded_selections(monkeypatch) as kept, PureKV(config)(model):
        ours = chat()
    if batch > 1:  # the twin has no notion of padding behind the prompt: compare with rows alone
        for row in range(batch):
            alone = prompt("mixed", rows=[row])
            real = mask[row].bool()
            with PureKV(config)(model):
                first = model.generate(**alone, **settings)
                ids = torch.cat([first.sequences, turn[row : row + 1, real]], dim=1)
                second = model.generate(
                    input_ids=ids, past_key_values=first.past_key_values, **settings
                )
            assert torch.equal(second.sequences[0, -12:], ours[1].sequences[row, -12:])
        return
    with twin_attention(model, inputs, kept, first_token):
        twin = chat()
    for ours_turn, twin_turn in zip(ours, twin, strict=True):
        assert torch.equal(ours_turn.sequences, twin_turn.sequences)


@pytest.mark.parametrize("batch", [1, 3])
def test_bytes_really_fall(batch):
    model = tiny_model()
    inputs = prompt("video", batch)
    full = DynamicCache()
    with torch.no_grad():
        model(**inputs, past_key_values=full)
    cache = DynamicCache()
    with PureKV(PureKVConfig(budget=0.2))(model) as run, torch.no_grad():
        model(**inputs, past_key_values=cache)
    report = run.report
    storages = [t.untyped_storage() for x in cache.layers for t in (x.keys, x.values)]
    assert report.kv_bytes_kept == sum(storage.nbytes() for storage in storages)
    assert report.kv_bytes_full == cache_bytes(full)
    kept = [
        text + visual
        for text, visual in zip(report.text_tokens, report.kept_visual_tokens, strict=True)
    ]
    assert report.kept_per_layer == [max(kept)] * 3
    assert report.kept_visual_tokens == [int(0.2 * count) for count in report.visual_tokens]
    assert report.compression == full.layers[0].keys.shape[2] / max(kept)


def test_prefill_never_holds_two_full_layers(monkeypatch):
    model = tiny_model(num_hidden_layers=6)
    cache = DynamicCache()
    lengths = []

    def note(*_):
        lengths.append([layer.physical_length for layer in cache.layers if layer.is_initialized])

    for layer in model.model.language_model.layers:
        layer.register_forward_hook(note)
    config = PureKVConfig(budget=0.2, source_layers=(3,))
    with recorded_selections(monkeypatch) as kept, PureKV(config)(model), torch.no_grad():
        model(**prompt("video"), past_key_values=cache)
    width = len(kept[0][0][0])
    assert lengths == [[width] * (done + 1) for done in range(6)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_half_precision_runs(allocation, dtype):
    model = tiny_model().to(dtype)
    config = PureKVConfig(budget=0.2, first_token="compressed", allocation=allocation)
    with PureKV(config)(model) as run:
        model.generate(**prompt("mixed", 3), **GREEDY)
    assert run.report.kv_bytes_kept < run.report.kv_bytes_full


def test_a_cache_goes_on_after_the_block():
    model = tiny_model()
    inputs = prompt()
    half = {**GREEDY, "max_new_tokens": 6, "min_new_tokens": 6}
    with PureKV(PureKVConfig(budget=0.3))(model):
        whole = model.generate(**inputs, **GREEDY)
        first = model.generate(**inputs, **half, return_dict_in_generate=True)
    cache = first.past_key_values
    rest = model.generate(input_ids=first.sequences, past_key_values=cache, **half)
    assert torch.equal(rest, whole)


@pytest.mark.parametrize(("allocation", "batch"), [("uniform", 3), ("ada", 1)])
def test_a_cache_of_uneven_rows_or_heads_does_not_go_on_elsewhere(allocation, batch):
    model = tiny_model()
    with PureKV(PureKVConfig(budget=0.3, allocation=allocation))(model):
        first = model.generate(**prompt("mixed", batch), **GREEDY, return_dict_in_generate=True)
    with pytest.raises(PureKVError, match="inside a PureKV block"):
        model.generate(
            input_ids=torch.nn.functional.pad(first.sequences, (0, 2), value=7),
            past_key_values=first.past_key_values,
            **GREEDY,
        )


@pytest.mark.parametrize("budget", [1.0, 0.3])
@pytest.mark.parametrize("allocation", ALLOCATIONS)
@pytest.mark.parametrize("rows", [[0, 1], [0, 0]])  # with padding and without
def test_a_further_turn_can_mask_what_a_finished_row_was_fed(rows, allocation, budget):
    """`generate` feeds padding to rows that are done; the next turn's mask takes it back."""
    model = tiny_model()
    turn = torch.tensor([[11, 12, 13]])
    settings = {**GREEDY, "return_dict_in_generate": True}

    def second_turn(rows, junk):
        inputs = prompt("mixed", rows=rows)
        first = model.generate(**inputs, **{**settings, "max_new_tokens": 6, "min_new_tokens": 6})
        seen = inputs["input_ids"].shape[1]
        cache = first.past_key_values
        cache.crop(seen - cache.get_seq_length())
        fed = torch.full((len(rows), 4 + junk), 21)
        mask = torch.cat([inputs["attention_mask"], torch.ones_like(fed)], 1)
        ids = torch.cat([inputs["input_ids"], fed], 1)
        model.generate(input_ids=ids, attention_mask=mask, past_key_values=cache, max_new_tokens=1)
        mask[0, seen + 4 :] = 0  # row 0 was done after four tokens
        new = turn.expand(len(rows), -1)
        return model.generate(
            input_ids=torch.cat([ids, new], 1),
            attention_mask=torch.cat([mask, torch.ones_like(new)], 1),
            past_key_values=cache,
            **GREEDY,
        )[0, -12:]

    if budget == 1.0:
        expected = second_turn(rows, junk=3)
    with PureKV(PureKVConfig(budget=budget, allocation=allocation))(model):
        ours = second_turn(rows, junk=3)
        if budget != 1.0:
            expected = second_turn([0], junk=0)
    assert torch.equal(ours, expected)


def test_a_refused_request_leaves_no_trace_in_the_next_report():
    model = tiny_model()
    with PureKV(PureKVConfig(budget=0.3))(model) as run:
        model.generate(**prompt(), **GREEDY)
        with pytest.raises(PureKVError):
            model.generate(input_ids=torch.tensor([[1, 2, 3]]), max_new_tokens=2)
        with pytest.raises(PureKVError, match="nothing was compressed"):
            _ = run.report
        model.generate(**prompt(), **GREEDY)
        assert run.report.seconds["vision"] > 0


@pytest.mark.parametrize("allocation", ["uniform", "pyramid", "ada"])
def test_a_cache_is_not_cropped_into_what_was_evicted(allocation):
    """Tokens behind the video can be forgotten, and asked again; those before it cannot."""
    model = tiny_model()
    inputs = prompt("video", 3)
    config = PureKVConfig(budget=0.3, allocation=allocation)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    after = int((ids == model.config.video_token_id).any(0).nonzero()[-1]) + 1
    with PureKV(config)(model):
        wanted = {**GREEDY, "return_dict_in_generate": True}
        first = model.generate(**inputs, **wanted)
        cache = first.past_key_values
        cache.crop(after + 1)
        assert cache.get_seq_length() == after + 1
        again = model.generate(input_ids=ids, attention_mask=mask, past_key_values=cache, **wanted)
        assert again.sequences.shape == first.sequences.shape
        with pytest.raises(PureKVError, match="start the prompt again"):
            again.past_key_values.crop(after - 1)
