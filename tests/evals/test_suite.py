"""Mixed data sets in batches: the same rights as one sample at a time, and honest tables."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LogitsProcessor

from purekv import PureKV, PureKVConfig, PureKVError
from purekv.evals import (
    Media,
    Outcome,
    Record,
    Sample,
    Turn,
    answer_samples,
    evaluate,
    make_configs,
    make_methods,
    method_name,
    method_names,
    prepare_samples,
    suite,
    summarise,
)
from purekv.evals.frames import FewerFrames
from purekv.media import Clip
from tests.core.prompts import pixels
from tests.tiny import tiny_model, tiny_processor

CONFIGS = [
    PureKVConfig(budget=budget, scorer=scorer, first_token="compressed")
    for scorer in ("clie", "streaming", "key_diff")
    for budget in (0.5, 0.25)
]
# Videos (frames, height, width), images (height, width) and turns of each sample.
KINDS = [
    ([(4, 32, 48)], [], 2),
    ([], [(48, 32)], 1),
    ([(4, 32, 48)], [], 2),
    ([(4, 32, 32), (6, 32, 32)], [], 3),
    ([(4, 32, 48)], [(32, 32), (48, 48)], 2),
    ([(4, 32, 48)], [], 2),
    ([(4, 32, 48)], [], 1),
    ([], [(32, 48), (32, 48)], 2),  # as many pixels as that video: one batch with it
    ([(4, 32, 48)], [], 2),
]
CHOICES = ("red", "green")


def turns(number: int, count: int) -> tuple[Turn, ...]:
    asked = [
        Turn("what? " + "really? " * number, "a cat", "open"),
        Turn("and which one?", "B", "closed", CHOICES),
        Turn("why?", "no", "open"),
    ]
    return tuple(asked[:count])


@pytest.fixture
def samples():
    return [
        Sample(
            str(number),
            tuple(Path(f"{number}/{i}.mp4") for i in range(len(videos))),
            tuple(Path(f"{number}/{i}.png") for i in range(len(images))),
            turns(number, count),
        )
        for number, (videos, images, count) in enumerate(KINDS)
    ]


def from_memory(sample: Sample) -> Media:
    seed = int(sample.id)
    videos, images, _ = KINDS[seed]
    return Media(
        tuple(Clip(pixels(seed, *size), 2.0) for size in videos),
        tuple(Image.fromarray(pixels(seed, 1, *size)[0]) for size in images),
    )


def ask(samples, configs=CONFIGS, **settings):
    found = evaluate(tiny_model(), tiny_processor(), samples, configs, batch_size=2,
                     **{"read": from_memory, **settings})  # fmt: skip
    return {record.id: record for records in found for record in records}


def test_batches_of_many_kinds_answer_as_each_sample_alone(samples):
    model, processor = tiny_model(), tiny_processor()
    configs = [*CONFIGS, PureKVConfig(budget=0.3, first_token="exact")]
    found = list(
        evaluate(model, processor, samples, configs, batch_size=2, read=from_memory)
    )  # fmt: skip
    assert [len(records) for records in found] == [2, 2, 1, 1, 1, 1, 1]
    records = {record.id: record for one in found for record in one}
    assert records["1"].visual_tokens == 3 * 2
    for sample in samples:
        batch = prepare_samples(model, processor, [sample], [from_memory(sample)])
        full, *ours = records[sample.id].outcomes
        dense = answer_samples(model, processor, batch, force=True)[0]
        assert full.answers == dense.texts
        assert (full.kl, full.agreement) == ([0.0] * len(full.kl), [1.0] * len(full.kl))
        for config, outcome in zip(configs, ours, strict=True):
            with PureKV(config)(model):
                row = answer_samples(model, processor, batch, force=True)[0]
            assert outcome.answers == row.texts
            for kl, agreement, a, b in zip(
                outcome.kl, outcome.agreement, dense.forced, row.forced, strict=True
            ):
                p, q = a.double(), b.double()
                assert kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), abs=1e-5)
                same = (p.argmax(-1) == q.argmax(-1)).double().mean()
                assert agreement == pytest.approx(float(same), abs=1e-5)
            assert outcome.kv_bytes < full.kv_bytes


def test_answers_read_off_the_gold_ones_are_right_where_decoded_ones_are(samples):
    """Gold answers are what the full cache decodes, so that some are right and some are not."""
    model, processor = tiny_model(), tiny_processor()
    common = {"budget": 0.25, "first_token": "compressed"}
    configs = [
        *CONFIGS,
        PureKVConfig(scorer="snapkv", allocation="ada", **common),
        PureKVConfig(evict="drop", source_layers=(1,), **common),
    ]
    letters = processor.tokenizer("abcdefghijklmnop", add_special_tokens=False)["input_ids"]
    model.generation_config.eos_token_id = letters[::3]
    head = torch.zeros_like(model.lm_head.weight)
    head[letters] = model.lm_head.weight[letters].detach()
    model.lm_head.weight = torch.nn.Parameter(head)  # says letters only

    def outcomes(asked, decode):
        found = evaluate(
            model, processor, asked, configs, batch_size=2, read=from_memory, decode=decode
        )
        records = {record.id: record for records in found for record in records}
        return [outcome for sample in asked for outcome in records[sample.id].outcomes]

    asked = []
    fulls = outcomes(samples, True)[:: 1 + len(configs)]
    for sample, full in zip(samples, fulls, strict=True):
        told = zip(sample.turns, full.answers, strict=True)
        asked.append(
            replace(
                sample,
                turns=tuple(replace(turn, answer=text or "no", choices=()) for turn, text in told),
            )
        )
    decoded, read = outcomes(asked, True), outcomes(asked, False)
    rights = [right for one in decoded for right in one.right]
    assert rights == [right for one in read for right in one.right]
    assert set(rights) == {True, False}
    for ours, theirs in zip(read, decoded, strict=True):
        assert (ours.agreement, ours.kv_bytes) == (theirs.agreement, theirs.kv_bytes)
        assert ours.kl == pytest.approx(theirs.kl, abs=1e-5)
        for right, text, whole in zip(ours.right, ours.answers, theirs.answers, strict=True):
            assert text == whole if right else whole.startswith(text) or text != whole


def test_forced_reading_is_what_a_plain_forward_of_the_whole_chat_says(samples):
    model, processor = tiny_model(), tiny_processor()
    sample = samples[0]
    batch = prepare_samples(model, processor, [sample], [from_memory(sample)])
    row = answer_samples(model, processor, batch, force=True)[0]
    gold = processor.tokenizer(sample.turns[0].answer, return_tensors="pt")["input_ids"]
    ids = torch.cat([batch.inputs["input_ids"], gold], 1)
    kinds = torch.nn.functional.pad(batch.inputs["mm_token_type_ids"], (0, gold.shape[1]))
    whole = {**batch.inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    whole["mm_token_type_ids"] = kinds
    with torch.no_grad():
        logits = model(**whole).logits[0, -gold.shape[1] - 1 :]
    torch.testing.assert_close(row.forced[0], logits.log_softmax(-1), atol=1e-4, rtol=1e-3)


def test_a_run_that_goes_on_asks_only_what_is_missing_in_the_same_batches(samples):
    whole = ask(samples)
    for kept in (["0", "2"], ["0", "2", "1", "5"], ["0"], []):
        done = {name: whole[name] for name in kept}
        read = []

        def spy(sample, read=read):
            read.append(sample.id)
            return from_memory(sample)

        again = ask(samples, done=done, read=spy)
        assert {**done, **again} == whole
        if kept[:2] == ["0", "2"]:
            assert not {"0", "2"} & set(read)


def test_a_refused_sample_keeps_its_place_in_its_batch(samples):
    four = [samples[0], samples[7], replace(samples[5], turns=turns(9, 2)), samples[8]]
    count = PureKVConfig(budget=10, first_token="compressed")

    def read(sample):  # 7 has as many pixels as the others, but the processor shrinks them
        large = Image.fromarray(pixels(7, 1, 48, 64)[0])
        return Media(images=(large,)) if sample.id == "7" else from_memory(sample)

    def batches(done):
        model, processor = tiny_model(), tiny_processor()
        found = evaluate(model, processor, four, [count], batch_size=2, read=read, done=done)
        return [{record.id: record for record in records} for records in found]

    first, second = batches({})
    assert first["7"].skipped
    assert batches(first) == [second]


def test_a_broken_sample_is_named_and_the_others_are_asked(samples):
    def read(sample):
        if sample.id == "2":
            raise PureKVError("not a video")
        return from_memory(sample)

    broken = ask(samples, read=read)
    assert broken["2"].skipped == "not a video"
    assert len(broken) == len(samples)
    rest = ask([sample for sample in samples if sample.id != "2"])
    assert {name: record for name, record in broken.items() if name != "2"} == rest
    # A budget that some samples cannot have is refused for these alone.
    few = ask(samples, [PureKVConfig(budget=10, first_token="compressed")])
    small = {s.id for s in samples if rest.get(s.id, broken["0"]).visual_tokens < 10}
    assert small
    assert {name for name, record in few.items() if record.skipped} == small


def test_numbers_that_are_not_finite_never_look_lossless(samples):
    model, processor = tiny_model(), tiny_processor()
    with torch.no_grad():
        model.model.language_model.layers[1].self_attn.v_proj.weight.fill_(float("nan"))
    found = evaluate(model, processor, samples[:2], CONFIGS[:1], batch_size=2, read=from_memory)
    for record in (record for records in found for record in records):
        assert record.outcomes == ()
        assert record.skipped == (
            "log-probabilities are not finite under the full cache; try --dtype float32"
        )


def test_the_method_that_is_not_finite_is_named(samples, monkeypatch):
    answer = suite.answer_samples

    def spoiled(model, processor, batch, stack=None, **settings):
        rows = answer(model, processor, batch, stack, **settings)
        if stack is None:  # the one that runs alone
            for row in rows:
                row.forced[0][-1] *= float("nan")
        return rows

    monkeypatch.setattr(suite, "answer_samples", spoiled)
    methods = [CONFIGS[0], PureKVConfig(budget=0.3, scorer="streaming", first_token="exact")]
    assert ask(samples[:1], methods)["0"].skipped == (
        "log-probabilities are not finite under streaming at budget 0.3; try --dtype float32"
    )


class _Says(LogitsProcessor):
    def __init__(self, text, seen):
        self.ids = tiny_processor().tokenizer(text, add_special_tokens=False)["input_ids"]
        self.seen = seen

    def __call__(self, input_ids, scores):
        place = min(input_ids.shape[1] - self.seen, len(self.ids) - 1)
        scores = torch.full_like(scores, -1e9)
        scores[:, self.ids[place]] = 0
        return scores


def model_that_says(text):
    """Whatever it is asked."""
    model = tiny_model()
    generate = model.generate
    model.generate = lambda **inputs: generate(
        **inputs, logits_processor=[_Says(text, inputs["input_ids"].shape[1])]
    )
    return model


@pytest.mark.parametrize(
    ("said", "right"),
    [
        ("yes.! Because<|im_end|>", False),
        ("yes......<|im_end|>", False),
        ("yes.<|im_end|>", True),
        ("yes<|im_end|>", True),
    ],
)
def test_an_answer_is_right_or_wrong_whatever_else_is_in_its_batch(samples, said, right):
    model, processor = model_that_says(said), tiny_processor()
    short = replace(samples[0], turns=(Turn("what?", "yes", ""),))
    long = replace(samples[2], turns=(Turn("what?", "a much longer gold answer", ""),))
    letter = replace(samples[5], turns=(Turn("which?", "Y", "", ("no",) * 24 + ("yes",)),))
    for together in ([short], [short, long], [short, letter]):
        found = evaluate(model, processor, together, CONFIGS[:1], batch_size=2, read=from_memory)
        records = {record.id: record for records in found for record in records}
        for outcome in records["0"].outcomes:
            assert outcome.answers == [said.split("<")[0][:5]]
            assert outcome.right == [right]


def test_a_letter_is_chosen_whatever_follows(samples):
    model, processor = model_that_says("B. green<|im_end|>"), tiny_processor()
    sample = replace(samples[0], turns=(Turn("which?", "B", "", CHOICES),))
    (records,) = evaluate(model, processor, [sample], CONFIGS[:1], read=from_memory)
    assert [outcome.right for outcome in records[0].outcomes] == [[True], [True]]


def test_tokens_that_a_model_masks_are_no_fault(samples):
    model, processor = tiny_model(), tiny_processor()

    def mask(output):
        output[..., 300:] = -torch.inf
        return output

    model.get_output_embeddings().register_forward_hook(lambda module, args, out: mask(out))
    found = evaluate(model, processor, samples[:2], CONFIGS[:1], batch_size=2, read=from_memory)
    for record in (record for records in found for record in records):
        assert record.skipped is None
        assert all(0 < kl < 100 for kl in record.outcomes[1].kl)


def test_equal_ids_are_refused(samples):
    with pytest.raises(PureKVError, match="same id"):
        ask(samples[:1] * 2)


def test_a_record_survives_json(samples):
    record = ask(samples[:1])["0"]
    assert Record.from_dict(json.loads(json.dumps(record.to_dict()))) == record
    for left_out in (Record("a", skipped="why"), Record("a", pixels=9, skipped="why")):
        assert Record.from_dict(json.loads(json.dumps(left_out.to_dict()))) == left_out


def outcome(right):
    return Outcome(["x"] * len(right), right, [0.5] * len(right), [1.0] * len(right), 100)


def test_a_summary_counts_by_category_turn_and_media(samples):
    records = {
        s.id: Record(s.id, 6, 1, (
            outcome([True] * len(s.turns)), outcome([False] + [True] * (len(s.turns) - 1)),
        ))
        for s in samples[:7]
    }  # fmt: skip
    records[samples[7].id] = Record(samples[7].id, skipped="broken")
    full, row = summarise(samples, records, CONFIGS[:1])
    samples = samples[:7]
    n = sum(len(s.turns) for s in samples)
    assert (row["method"], row["budget"], row["n"], row["samples"]) == ("clie", 0.5, n, 7)
    assert row["accuracy"] == row["retention"] == pytest.approx((n - 7) / n)
    assert {k: (v["n"], v["accuracy"]) for k, v in row["by_turn"].items()} == {
        "1": (7, 0.0), "2": (5, 1.0), "3": (1, 1.0)
    }  # fmt: skip
    assert (row["first_turn"]["accuracy"], row["second_turn"]["n"]) == (0.0, 6)
    assert row["by_category"]["closed"]["accuracy"] == 1.0
    assert {k: v["n"] for k, v in row["by_media"].items()} == {
        "video": 7, "image": 1, "videos": 3, "mixed": 2
    }  # fmt: skip
    assert np.isclose(row["by_category"]["open"]["accuracy"], 1 / 8)
    assert row["mcnemar_p"] == pytest.approx(2 / 2**7)
    assert (row["kl"], row["kv_bytes"], row["tokens"]) == (0.5, 100, 6)
    assert (full["method"], full["accuracy"], full["mcnemar_p"]) == ("full", 1.0, 1.0)


def test_nothing_right_has_no_retention(samples):
    records = {s.id: Record(s.id, 6, 1, (outcome([False] * len(s.turns)),)) for s in samples}
    (row,) = summarise(samples, records, [])
    assert (row["accuracy"], row["retention"], row["retention_ci95"]) == (0.0, None, None)


def test_fewer_frames_are_what_a_plain_model_says_of_them(samples):
    method = FewerFrames(0.5)
    records = ask(samples, [method])
    model, processor = tiny_model(), tiny_processor()
    for sample in samples:
        media = method.thin(from_memory(sample))
        assert [len(clip.frames) for clip in media.videos] == [
            max(2, 2 * round(size[0] / 4)) for size in KINDS[int(sample.id)][0]
        ]
        batch = prepare_samples(model, processor, [sample], [media])
        full, ours = records[sample.id].outcomes
        assert ours.answers == answer_samples(model, processor, batch)[0].texts
        if sample.videos:
            assert ours.kv_bytes < full.kv_bytes


def test_chosen_frames_are_spread_over_the_whole_clip():
    frames = np.arange(20)[:, None, None, None]
    clip = FewerFrames(0.2).thin(Media(videos=(Clip(frames, 2.0),))).videos[0]
    assert clip.frames.ravel().tolist() == [2, 7, 12, 17]
    assert clip.fps == pytest.approx(0.4)
    with pytest.raises(PureKVError, match="share"):
        FewerFrames(200)


@pytest.mark.parametrize("name", [*method_names(), "clie+ada"])
def test_every_method_has_a_config_that_goes_by_its_name(name):
    if name == "frame_difference":  # by its published name, evs
        return
    (method,) = make_methods([name], [1.0, 0.3], first_token="compressed")
    assert method_name(method) == name
    assert method.budget == 0.3


def test_methods_of_one_budget_hold_equal_bytes(samples):
    one = PureKVConfig(budget=0.5, scorer="clie", first_token="compressed")
    configs = [
        one,
        replace(one, first_token="exact"),
        replace(one, scorer="streaming"),
        PureKVConfig(budget=0.5, scorer="frame_difference", evict="drop", first_token="compressed"),
        replace(one, scorer="key_diff"),
        replace(one, allocation="pyramid"),
        replace(one, allocation="ada"),
        FewerFrames(1.0),
        PureKVConfig(budget=1.0, first_token="exact"),
    ]
    for record in ask(samples, configs).values():
        full, *ours, ada, frames, dense = [o.kv_bytes for o in record.outcomes]
        assert len(set(ours)) == 1
        # Its index is 96 bytes; it stores no padding, at most a token of 768 bytes here.
        assert -768 <= ada - ours[0] <= 96
        assert full == frames == dense


def test_methods_that_drop_are_asked_by_themselves(samples):
    methods = [
        PureKVConfig(budget=0.4, evict="drop", source_layers=(0,), first_token="compressed"),
        *make_configs(["evs"], [0.4], first_token="compressed"),
    ]
    records = ask(samples, methods)
    model, processor = tiny_model(), tiny_processor()
    for sample in samples:
        batch = prepare_samples(model, processor, [sample], [from_memory(sample)])
        for method, outcome in zip(methods, records[sample.id].outcomes[1:], strict=True):
            with PureKV(method)(model):
                assert outcome.answers == answer_samples(model, processor, batch)[0].texts
