"""Batched answering equals answering one by one, and history is the gold one."""

import json
from dataclasses import replace

import pytest
import torch

from purekv import PureKV, PureKVConfig, PureKVError
from purekv.evals import SharedPrefill, answer_samples, prepare_samples, read_samples
from purekv.upstream import CACHE, cache_of
from tests.media.clips import write_video
from tests.tiny import tiny_model, tiny_processor


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    lines = []
    for number, (question, answer) in enumerate(
        [("what?", "a cat"), ("how many of them are there?", "3"), ("who is it", "nobody at all")]
    ):
        write_video(folder / f"{number}.mp4", num_frames=24 + 24 * number)
        turns = [{"question": question, "answer": answer}, {"question": "and?", "answer": "no"}]
        lines.append({"id": number, "video": f"{number}.mp4", "turns": turns, "category": "x"})
    (folder / "data.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    return read_samples(folder / "data.jsonl")


@pytest.mark.parametrize("budget", [None, 0.3])
def test_a_batch_answers_as_each_sample_alone(samples, budget):
    model, processor = tiny_model(), tiny_processor()

    def answer(asked):
        batch = prepare_samples(model, processor, asked)
        batch = replace(batch, max_new_tokens=[[16] * len(asked)] * 2)
        if budget is None:
            return [row.texts for row in answer_samples(model, processor, batch)]
        config = PureKVConfig(budget=budget, first_token="compressed")
        with PureKV(config)(model):
            return [row.texts for row in answer_samples(model, processor, batch)]

    together = answer(samples)
    assert together == [answer([sample])[0] for sample in samples]
    assert all(len(turns) == 2 for turns in together)


SCORERS_TWICE = [(budget, scorer) for budget in (0.5, 0.2) for scorer in ("clie", "h2o", "vatp")]


@pytest.mark.parametrize("rows_at_once", [1, 6, 100])
def test_a_stack_answers_as_each_method_and_sample_alone(samples, rows_at_once):
    model, processor = tiny_model(), tiny_processor()
    configs = [
        PureKVConfig(budget=budget, scorer=scorer, first_token="compressed")
        for budget, scorer in [*SCORERS_TWICE, (1.0, "clie")]
    ]
    configs.append(PureKVConfig(budget=0.5, scorer="clie", window=3, first_token="compressed"))
    configs += [
        replace(config, allocation=allocation)
        for allocation in ("pyramid", "ada")
        for config in configs[1:4]  # two scorers of one budget, one of another
    ]
    batch = prepare_samples(model, processor, samples)
    answers = {}
    with SharedPrefill(configs, model, rows_at_once) as run:
        for stack in run.stacks(batch.inputs):
            rows = answer_samples(model, processor, batch, stack)
            assert len(stack.members) <= max(1, rows_at_once // len(samples))
            for place, member in enumerate(stack.members):
                answers[member] = [
                    row.texts for row in rows[place * len(samples) :][: len(samples)]
                ]
    assert len(answers) == 1 + len(configs)
    assert len({str(texts) for texts in answers.values()}) > 4  # eviction does show
    for number, sample in enumerate(samples):
        alone = prepare_samples(model, processor, [sample])
        assert answers[None][number] == answer_samples(model, processor, alone)[0].texts
        for member, config in enumerate(configs):
            with PureKV(config)(model):
                assert answers[member][number] == answer_samples(model, processor, alone)[0].texts


@pytest.mark.parametrize("budget", [None, 0.3])
def test_an_empty_gold_answer_has_one_place_in_any_batch(samples, budget):
    model, processor = tiny_model(), tiny_processor()
    turns = tuple(replace(turn, answer="") for turn in samples[0].turns)
    empty = replace(samples[0], turns=turns)

    def forced(asked):
        batch = prepare_samples(model, processor, asked)
        if budget is None:
            return answer_samples(model, processor, batch, force=True)[0].forced
        with PureKV(PureKVConfig(budget=budget, first_token="compressed"))(model):
            return answer_samples(model, processor, batch, force=True)[0].forced

    alone = forced([empty])
    assert [turn.shape for turn in alone] == [(1, 320), (1, 320)]
    for together in ([empty, samples[2]], [empty, empty]):
        torch.testing.assert_close(forced(together), alone, atol=1e-4, rtol=1e-3)


def test_a_shared_prefill_needs_pixels_and_left_padding(samples):
    model, processor = tiny_model(), tiny_processor()
    batch = prepare_samples(model, processor, samples)
    config = PureKVConfig(budget=0.5)
    inputs = {name: x.flip(1) if x.ndim == 2 else x for name, x in batch.inputs.items()}
    inputs |= {name: batch.inputs[name] for name in inputs if "grid" in name or "pixel" in name}
    with SharedPrefill([config], model) as run, pytest.raises(PureKVError, match="on the left"):
        run.stacks(inputs)


def test_the_second_turn_reads_the_gold_answer(samples, monkeypatch):
    model, processor = tiny_model(), tiny_processor()
    prompts = []
    generate = model.generate

    def spy(**inputs):
        prompts.append(processor.batch_decode(inputs["input_ids"]))
        return generate(**inputs)

    monkeypatch.setattr(model, "generate", spy)
    answer_samples(model, processor, prepare_samples(model, processor, samples))
    for sample, text in zip(samples, prompts[1], strict=True):
        first, second = sample.turns
        wanted = (
            f"{first.question}<|im_end|>\n<|im_start|>assistant\n{first.answer}<|im_end|>\n"
            f"<|im_start|>user\n{second.question}<|im_end|>\n<|im_start|>assistant\n"
        )
        assert text.replace("<|endoftext|>", "").endswith(wanted)


def test_a_broken_data_file_is_named(tmp_path):
    path = tmp_path / "data.jsonl"
    with pytest.raises(PureKVError, match="not found"):
        read_samples(path)
    path.write_text('{"id": 1, "turns": [{"question": "a", "answer": "b"}]}\n')
    with pytest.raises(PureKVError, match=r"data.jsonl:1 .*no media"):
        read_samples(path)
    path.write_text("nonsense\n")
    with pytest.raises(PureKVError, match="is not a sample"):
        read_samples(path)


@pytest.mark.parametrize("decode", [True, False])
def test_a_turn_behind_a_long_video_stands_where_transformers_puts_it(tmp_path, decode):
    """More temporal patches than rows: the video's positions reach further than its question's."""
    model, processor = tiny_model(), tiny_processor()
    write_video(tmp_path / "long.mp4", num_frames=400)
    turns = [{"question": "what?", "answer": "a cat"}, {"question": "and?", "answer": "no"}]
    line = {"id": "long", "video": "long.mp4", "turns": turns}
    (tmp_path / "data.jsonl").write_text(json.dumps(line))
    batch = prepare_samples(model, processor, read_samples(tmp_path / "data.jsonl"))
    frames, height, _ = batch.inputs["video_grid_thw"][0].tolist()
    assert frames > height

    with SharedPrefill([], model) as run:
        (stack,) = run.stacks(batch.inputs)
        (row,) = answer_samples(model, processor, batch, stack, force=True, decode=decode)
    asked = {"do_sample": False, "return_dict_in_generate": True}
    chat = model.generate(**batch.inputs, max_new_tokens=2, **asked)
    cache = cache_of(chat)
    cache.crop(batch.inputs["input_ids"].shape[1] - cache.get_seq_length())
    first, second = (prompts[0] for prompts in batch.prompts)
    new = processor.tokenizer(second[len(first) :], add_special_tokens=False, return_tensors="pt")
    ids = torch.cat([batch.inputs["input_ids"], new["input_ids"]], dim=1)
    later = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=1,
        output_logits=True,
        **{CACHE: cache},
        **asked,
    )
    torch.testing.assert_close(
        row.forced[1][0], later.logits[0][0].log_softmax(-1), atol=1e-4, rtol=1e-3
    )
