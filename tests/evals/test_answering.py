"""Batched answering equals answering one by one, and history is the gold one."""

import json

import pytest

from purekv import PureKV, PureKVConfig, PureKVError
from purekv.evals import SharedPrefill, answer_samples, prepare_samples, read_samples
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
        if budget is None:
            return answer_samples(model, processor, batch)
        config = PureKVConfig(budget=budget, first_token="compressed")
        with PureKV(config)(model):
            return answer_samples(model, processor, batch)

    together = answer(samples)
    assert together == [answer([sample])[0] for sample in samples]
    assert all(len(turns) == 2 for turns in together)


def test_a_shared_prefill_answers_as_each_method_alone(samples):
    model, processor = tiny_model(), tiny_processor()
    configs = [
        PureKVConfig(budget=budget, scorer=scorer, first_token="compressed")
        for budget in (0.5, 0.2)
        for scorer in ("clie", "snapkv", "random")
    ]
    for sample in samples:
        batch = prepare_samples(model, processor, [sample])
        bare = answer_samples(model, processor, batch)
        with SharedPrefill(configs, model) as run:
            assert answer_samples(model, processor, batch) == bare
            shared = [answer_samples(model, processor, batch, cache=c) for c in run.caches]
        for config, answers in zip(configs, shared, strict=True):
            with PureKV(config)(model):
                assert answer_samples(model, processor, batch) == answers


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
