"""Sound in evaluations: it reaches the models that hear, is compressed with the picture, and is
named where a model is deaf."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from purekv import PureKV, PureKVConfig, PureKVError
from purekv.cli import main
from purekv.evals import (
    Media,
    answer_samples,
    evaluate,
    make_methods,
    prepare_samples,
    read_media,
)
from purekv.evals.answering import whole_chats
from purekv.evals.samples import Sample, Turn, read_samples
from purekv.families import for_config
from purekv.families.videollama2 import Processor, load
from purekv.inputs import hears, model_inputs
from purekv.loading import Checkpoint
from purekv.media import Clip
from purekv.reference import write_dataset
from purekv.reference.data import video
from tests.media.clips import write_video
from tests.tiny_omni import FRAMES, SECOND, omni_model, omni_processor, save_omni
from tests.videollama2 import checkpoints

SECONDS = 6
FAMILIES = ["videollama2", "omni"]
TOKENS = {"videollama2": 18 + 1496, "omni": SECONDS * (FRAMES + SECOND)}
"""Of a prompt's picture and sound."""


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Two samples, two questions each."""
    folder = tmp_path_factory.mktemp("audiovisual")
    return write_dataset(
        folder, n=2, seed=1, geometry=video(SECONDS, 6), turns=(0, 1, 0), audio=True
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    write = {
        "videollama2": lambda path: checkpoints.write(path, "av"),
        "deaf": lambda path: checkpoints.write(path, "qwen2"),
        "omni": save_omni,
    }
    return lambda name: folder / name if (folder / name).exists() else write[name](folder / name)


@pytest.fixture(scope="module")
def there(checkpoint):
    """Model and processor of a family that hears."""
    made = {}

    def get(name: str) -> SimpleNamespace:
        if name not in made and name == "omni":
            made[name] = SimpleNamespace(model=omni_model(), processor=omni_processor())
        elif name not in made:
            path = checkpoint(name)
            made[name] = SimpleNamespace(
                model=load(path), processor=Processor.from_pretrained(path)
            )
        return made[name]

    return get


def run(capsys, *words) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as leaving:
        main([str(word) for word in words])
    out, err = capsys.readouterr()
    return int(leaving.value.code or 0), out, err


@pytest.mark.parametrize("name", FAMILIES)
def test_an_evaluation_with_sound(capsys, checkpoint, data, tmp_path, name) -> None:
    code, out, err = run(
        capsys, "eval", "--model", checkpoint(name), "--data", data, "--methods", "clie,snapkv",
        "--budgets", "1.0,0.2", "--batch", 2, "--speed-samples", 1, "--out", tmp_path, "--json",
    )  # fmt: skip
    assert code == 0, err
    assert "does not hear" not in err
    result = json.loads(out)
    assert result["sound"] == {"heard": 2, "unheard": 0}
    full, clie, snapkv = result["rows"]
    assert [row["method"] for row in result["rows"]] == ["full", "clie", "snapkv"]
    for row in result["rows"]:
        assert (row["samples"], row["n"], row["second_turn"]["n"]) == (2, 4, 2)
        assert row["tokens"] == TOKENS[name]
        assert row["prefill_s"] > 0
    assert clie["kv_bytes"] == snapkv["kv_bytes"] < 0.35 * full["kv_bytes"]
    assert min(clie["kl"], snapkv["kl"]) > 0
    lines = (tmp_path / "samples.jsonl").read_text().splitlines()
    assert [json.loads(line)["sound"] for line in lines] == ["heard"] * 2


def test_a_deaf_model_says_so_and_goes_on(capsys, checkpoint, data) -> None:
    code, out, err = run(
        capsys, "eval", "--model", checkpoint("deaf"), "--data", data, "--methods", "clie",
        "--budgets", "0.5", "--speed-samples", 0, "--json",
    )  # fmt: skip
    assert code == 0, err
    assert "this model does not hear: the sound of 2 of 2 samples was left out" in err
    assert json.loads(out)["sound"] == {"heard": 0, "unheard": 2}
    assert json.loads(out)["rows"][0]["tokens"] == 18


def test_of_a_whole_omni_the_thinker_is_loaded(checkpoint, there) -> None:
    loaded = Checkpoint.find(checkpoint("omni")).model()
    ours = there("omni").model.state_dict()
    assert loaded.state_dict().keys() == ours.keys()
    assert all(torch.equal(loaded.state_dict()[name], ours[name]) for name in ours)


def first_logits(model, inputs) -> torch.Tensor:
    output = model.generate(
        **inputs, max_new_tokens=1, do_sample=False, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    return output.logits[0]


def with_wave(media, change):
    return replace(media, videos=tuple(replace(v, wave=change(v.wave)) for v in media.videos))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_sound_alone_changes_the_logits(there, data, name) -> None:
    av, sample = there(name), read_samples(data)[0]
    media = read_media(av.processor, sample)
    assert media.sound == "heard"
    assert len(media.videos[0].wave) == SECONDS * 16000

    def logits(media):
        batch = prepare_samples(av.model, av.processor, [sample], [media])
        return first_logits(av.model, batch.inputs)

    as_it_is = logits(media)
    assert torch.equal(as_it_is, logits(read_media(av.processor, sample)))
    for other in (lambda wave: wave[::-1].copy(), lambda wave: np.zeros_like(wave)):
        assert not torch.allclose(as_it_is, logits(with_wave(media, other)), atol=1e-3)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_whole_budget_changes_nothing_and_a_part_forgets_sound_too(there, data, name) -> None:
    av, samples = there(name), read_samples(data)
    inputs = prepare_samples(av.model, av.processor, samples).inputs
    bare = first_logits(av.model, inputs)
    with PureKV(PureKVConfig(budget=1.0))(av.model) as whole:
        assert torch.equal(first_logits(av.model, inputs), bare)
        assert whole.report.visual_tokens == [TOKENS[name]] * 2
    layout = for_config(av.model.config).layout(av.model.config, inputs)
    spans = layout.spans[0]
    assert {span.modality for span in spans} == {"video", "audio"}
    video_tokens = sum(span.length for span in spans if span.modality == "video")
    with PureKV(PureKVConfig(budget=0.1, scorer="streaming"))(av.model) as run:
        first_logits(av.model, inputs)
        kept = run.report.kept_visual_tokens[0]
    # Fewer than there are of either: both were evicted.
    assert kept == int(0.1 * TOKENS[name]) < max(video_tokens, TOKENS[name] - video_tokens)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_later_turn_is_as_if_all_were_one_prompt(there, data, name) -> None:
    """Positions behind sound go on where they should."""
    av, samples = there(name), read_samples(data)
    batch = prepare_samples(av.model, av.processor, samples)
    rows = answer_samples(av.model, av.processor, batch, force=True)
    inputs = whole_chats(av.processor, batch)
    if name == "videollama2":  # stock language models count padding, unless told otherwise
        inputs["position_ids"] = inputs["attention_mask"].cumsum(-1).sub(1).clamp(min=0)
    with torch.no_grad():
        logits = av.model(**inputs).logits.float().log_softmax(-1)
    for row, ours in zip(logits, rows, strict=True):
        places = len(ours.forced[1])
        torch.testing.assert_close(ours.forced[1], row[-places:], rtol=1e-3, atol=1e-3)


def test_batches_answer_as_each_sample_alone(there, tmp_path) -> None:
    """Omni: sounds of two lengths, and a video without."""
    av = there("omni")
    rng = np.random.default_rng(0)
    clips = {
        str(number): Clip(
            rng.integers(0, 256, (4, 56, 56, 3), dtype=np.uint8), 2.0, wave, has_sound=True
        )
        for number, wave in enumerate(
            [rng.normal(0, 0.1, 16000 * n).astype(np.float32) for n in (2, 1)] + [None, None]
        )
    }
    clips["2"] = replace(clips["2"], has_sound=False)
    clips["3"] = replace(clips["3"], has_sound=False)
    turns = (Turn("what?", "a cat", "all"), Turn("why?", "no", "all"))
    samples = [Sample(name, (Path(name),), (), turns) for name in clips]

    def records(size: int) -> dict:
        found = evaluate(
            av.model, av.processor, samples, make_methods(["clie"], [0.3]), batch_size=size,
            read=lambda sample: Media((clips[sample.id],)),
        )  # fmt: skip
        return {record.id: record for some in found for record in some}

    together, alone = records(2), records(1)
    assert [together[name].visual_tokens for name in clips] == [
        2 * FRAMES + 2 * SECOND, 2 * FRAMES + SECOND, 2 * FRAMES, 2 * FRAMES
    ]  # fmt: skip
    assert [together[name].sound for name in clips] == ["heard", "heard", None, None]
    for name in clips:
        for ours, theirs in zip(together[name].outcomes, alone[name].outcomes, strict=True):
            assert ours.answers == theirs.answers
            assert ours.kl == pytest.approx(theirs.kl, abs=1e-4)


def test_one_rate_for_videos_with_sound() -> None:
    processor = omni_processor()
    assert hears(processor)
    frames = np.zeros((4, 56, 84, 3), np.uint8)
    clips = [Clip(frames, rate, np.zeros(16000, np.float32)) for rate in (1.0, 2.0)]
    with pytest.raises(PureKVError, match="1, 2 frames a second in one prompt"):
        model_inputs(processor, ["<|vision_bos|><|VIDEO|><|vision_eos|>"] * 2, clips)
    silent = [replace(clip, wave=None) for clip in clips]
    inputs = model_inputs(processor, ["<|vision_bos|><|VIDEO|><|vision_eos|>"] * 2, silent)
    assert "input_features" not in inputs


def broken_sound(path: Path, folder: Path) -> Path:
    """The same file, its sound's packets overwritten."""
    import av

    made = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        for packet in container.demux(container.streams.audio[0]):
            if packet.pos is not None and packet.size:
                made[packet.pos : packet.pos + packet.size] = bytes(packet.size)
    target = folder / "broken.mp4"
    target.write_bytes(made)
    return target


def test_sound_that_is_broken_or_missing(capsys, checkpoint, data, tmp_path) -> None:
    broken = broken_sound(read_samples(data)[0].videos[0], tmp_path)
    silent = write_video(tmp_path / "silent.mp4", num_frames=24)
    words = ["run", "--model", checkpoint("videollama2"), "--ask", "what?", "--max-new-tokens", 2]
    code, out, err = run(capsys, *words, "--video", broken)
    assert (code, out) == (2, "")
    assert "sound that cannot be decoded" in err.splitlines()[-1]
    code, _, err = run(capsys, *words, "--video", silent)  # heard as silence
    assert code == 0, err
    lines = [
        {"id": path.stem, "video": path.name, "turns": [{"question": "what?", "answer": "a"}]}
        for path in (broken, silent)
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    code, out, err = run(
        capsys, "eval", "--model", checkpoint("videollama2"), "--data", tmp_path, "--methods",
        "clie", "--budgets", "0.5", "--speed-samples", 0, "--json",
    )  # fmt: skip
    assert code == 0, err
    assert "skipped sample broken: sound that cannot be decoded" in err
    assert json.loads(out)["sound"] == {"heard": 0, "unheard": 0}
