"""Prompts, frames and sound; and the command line on an official-format checkpoint."""

import json
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from PIL import Image

from purekv import PureKV, PureKVConfig, PureKVError
from purekv.cli import main
from purekv.families.videollama2 import Processor, load
from purekv.families.videollama2.fbank import fbank, thirty_seconds, video_clips
from purekv.media import read_audio, read_frames
from tests.media.clips import frame_index, write_video
from tests.videollama2 import checkpoints


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    root = tmp_path_factory.mktemp("videollama2")
    return lambda name: (
        root / name if (root / name).exists() else checkpoints.write(root / name, name)
    )


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    path = tmp_path_factory.mktemp("media") / "clip.mp4"
    return write_video(path, num_frames=48, audio=True)


def text_of(processor, ids):
    """The prompt, each run of a placeholder as its tag and count."""
    text, row = "", ids.tolist()
    tags = {-200: "<image>", -201: "<video>", -202: "<audio>"}
    while row:
        count = next((n for n, id in enumerate(row) if id != row[0]), len(row))
        text += f"{tags[row[0]]}{count}" if row[0] < 0 else processor.tokenizer.decode(row[:1])
        row = row[count if row[0] < 0 else 1 :]
    return text


def test_prompts(directory, video):
    mistral = Processor.from_pretrained(directory("mistral"))
    inputs = mistral.ask("what?", video=video)
    text = text_of(mistral, inputs["input_ids"][0])
    assert text.startswith("[system]<<SYS>>\nYou are a helpful, respectful and honest assistant.")
    assert "safe.  Your" in text
    assert "nature.\nIf" in text
    assert text.endswith(
        "information.\n<</SYS>><|im_end|>[user]<video>48\nwhat?<|im_end|>[assistant]"
    )
    assert inputs["pixel_values_videos"].shape == (1, 4, 3, 24, 24)
    av_model = Processor.from_pretrained(directory("av"))
    inputs = av_model.ask("what?", video=video)
    text = text_of(av_model, inputs["input_ids"][0])
    assert text == "[user]<video>18<audio>1496\nwhat?<|im_end|>[assistant]"
    assert inputs["audio_values"].shape == (1, 2998, 128)
    silent = av_model.ask("what?", video=video, sound=False)
    assert text_of(av_model, silent["input_ids"][0]).startswith("[user]<video>18\nwhat?")
    heard = av_model.ask("what?", audio=video)
    assert text_of(av_model, heard["input_ids"][0]).startswith("[user]<audio>1496\nwhat?")


def test_each_part_of_a_prompt_is_tokenised_on_its_own(directory):
    seen = []

    class Tokenizer(SimpleNamespace):
        def __call__(self, text, add_special_tokens):
            seen.append((text, add_special_tokens))
            return {"input_ids": [1]}

    there = Processor.from_pretrained(directory("mistral"))
    there.tokenizer = Tokenizer(pad_token="x", pad_token_id=0)
    frames = np.zeros((4, 30, 40, 3), np.uint8)
    ids = there("one <video>\ntwo", videos=[frames])["input_ids"]
    assert seen == [("one ", False), ("\ntwo", False)]
    assert ids.tolist() == [[1, *[-201] * 48, 1]]


def test_frames_are_the_middles_of_equal_segments(directory, video):
    processor = Processor.from_pretrained(directory("qwen2"))
    numbers = processor._frame_numbers(48)
    assert numbers == [6, 18, 29, 41]
    assert [frame_index(frame) for frame in read_frames(video, lambda total: numbers)] == numbers


@pytest.mark.parametrize("name", ["mistral", "qwen2"])
def test_pixels(directory, name):
    """CLIP cuts the middle out of the resized frame, SigLIP squashes it."""
    processor = Processor.from_pretrained(directory(name))
    side = checkpoints.KINDS[name].image_size
    picture = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    size = (side, side) if name == "qwen2" else (round(side * 60 / 40), side)
    resized = Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC)
    left = (resized.width - side) // 2
    expected = np.asarray(resized.crop((left, 0, left + side, side)), dtype=np.float32) / 255
    expected = torch.from_numpy((expected - 0.5) / 0.5).permute(2, 0, 1)
    made = processor("<image>", images=[picture])["pixel_values"][0]
    torch.testing.assert_close(made, expected, rtol=0, atol=1e-5)


def plain_fbank(wave):
    """Kaldi's filter banks from their description, one window and one bin after another."""
    wave = wave.astype(np.float64) * 2**15
    mel = lambda hertz: 1127 * np.log(1 + hertz / 700)  # noqa: E731
    edges = np.linspace(mel(20), mel(8000), 130)
    frequencies = mel(np.arange(257) * 16000 / 512)
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 399)
    rows = []
    for start in range(0, len(wave) - 399, 160):
        window = wave[start : start + 400] - wave[start : start + 400].mean()
        window = window - 0.97 * np.concatenate([window[:1], window[:-1]])
        power = np.abs(np.fft.rfft(window * hann**0.85, 512)) ** 2
        row = []
        for low, middle, high in zip(edges[:-2], edges[1:-1], edges[2:], strict=True):
            up, down = (frequencies - low) / (middle - low), (high - frequencies) / (high - middle)
            row.append(np.log(max(np.clip(np.minimum(up, down), 0, None) @ power, 2.0**-23)))
        rows.append(row)
    return np.array(rows)


def test_filter_banks():
    wave = np.random.default_rng(0).uniform(-0.3, 0.3, 8000).astype(np.float32)
    np.testing.assert_allclose(fbank(wave), plain_fbank(wave), atol=1e-3)
    silence = fbank(thirty_seconds(np.zeros(100, np.float32)))
    assert silence.shape == (2998, 128)
    np.testing.assert_allclose(silence, -15.942, atol=1e-3)


def test_clips_of_a_videos_sound():
    ramp = np.arange(20 * 16000)
    clips = video_clips(ramp).reshape(8, 32000)
    assert clips[:, 0].tolist() == [number * 36000 for number in range(8)]  # 18 s / 8
    assert np.array_equal(clips[7], ramp[252000:284000])
    assert np.array_equal(video_clips(ramp[:100]), np.tile(ramp[:100], 8))


def test_sound_is_mixed_and_resampled(tmp_path):
    tone = np.sin(np.arange(48000) / 48000 * 2 * np.pi * 440) * 0.5
    stereo = (np.stack([tone, np.zeros_like(tone)]) * 2**15).astype(np.int16)
    path = tmp_path / "tone.wav"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=48000, layout="stereo")
        packed = stereo.T.reshape(1, -1).copy()
        frame = av.AudioFrame.from_ndarray(packed, format="s16", layout="stereo")
        frame.sample_rate = 48000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    wave = read_audio(path)
    assert abs(len(wave) - 16000) < 50
    expected = 0.25 * np.sin(np.arange(len(wave)) / 16000 * 2 * np.pi * 440)
    assert np.abs(wave - expected)[200:-200].max() < 0.02
    assert np.array_equal(read_audio(path, start=0.25, end=0.5), wave[4000:8000])


def test_a_video_without_sound_is_silent(directory, tmp_path):
    processor = Processor.from_pretrained(directory("av"))
    path = write_video(tmp_path / "clip.mp4", num_frames=12)
    banks = processor.ask("what?", video=path)["audio_values"]
    assert banks.unique().tolist() == [-15.9375]  # in bfloat16
    with pytest.raises(PureKVError, match="no sound"):
        processor.ask("what?", audio=path)


def test_a_question_about_a_file(directory, video):
    for name in ("mistral", "av"):
        model, processor = load(directory(name)), Processor.from_pretrained(directory(name))
        inputs = processor.ask("what?", video=video)
        with PureKV(PureKVConfig(budget=0.2))(model) as run:
            made = model.generate(**inputs, max_new_tokens=3, do_sample=False)
        assert made.shape[1] == inputs["input_ids"].shape[1] + 3
        assert run.report.kv_bytes_kept < run.report.kv_bytes_full


def test_a_batch_is_padded_on_the_left(directory):
    processor = Processor.from_pretrained(directory("qwen2"))
    frames = np.zeros((2, 4, 20, 30, 3), np.uint8)
    inputs = processor(["<video>a", "<video>abc"], videos=list(frames))
    assert inputs["attention_mask"].sum(1).tolist() == [19, 21]
    assert inputs["attention_mask"][0, :2].tolist() == [0, 0]
    with pytest.raises(PureKVError, match="equally many"):
        processor(["<video>a", "<video>b"], videos=[frames[0], frames[0, :2]])
    with pytest.raises(PureKVError, match="max_pixels"):
        processor("<image>", images=[frames[0, 0]], images_kwargs={"size": {}})


@pytest.mark.parametrize("name", ["mistral", "qwen2", "av"])
def test_the_command_line(directory, video, capsys, name):
    words = ["run", "--model", directory(name), "--video", video, "--ask", "what?", "--ask", "why?"]
    words += ["--compare", "--max-new-tokens", 4, "--json"]
    with pytest.raises(SystemExit) as leaving:
        main([str(word) for word in words])
    out, err = capsys.readouterr()
    assert not leaving.value.code, err
    data = json.loads(out)
    assert data["visual_tokens"] == {"mistral": 48, "qwen2": 18, "av": 18 + 1496}[name]
    assert len(data["answers"]) == len(data["dense"]["answers"]) == 2
    assert data["kv_bytes_kept"] < data["kv_bytes_full"] == data["dense"]["kv_bytes_kept"]
