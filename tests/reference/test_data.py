"""Datasets: the same bytes again, readable by anyone, and close to the pixels that were drawn."""

from __future__ import annotations

import json
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from purekv.reference import sample_questions, sample_video, write_dataset
from purekv.reference.data import samples
from purekv.reference.render import Renderer, pack
from purekv.reference.sample import sample_turns
from purekv.reference.tokens import CHAT_TEMPLATE


def files(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize("frames", [4, 1])
def test_the_same_bytes_again(tmp_path: Path, frames: int) -> None:
    seen: list[tuple[int, int]] = []
    for name in ("a", "b"):
        write_dataset(
            tmp_path / name, n=3, seed=1, frames=frames, size=168,
            progress=lambda done, total: seen.append((done, total)),
        )  # fmt: skip
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert seen[:3] == [(1, 3), (2, 3), (3, 3)]
    write_dataset(tmp_path / "b", n=3, seed=2, frames=frames, size=168)
    assert files(tmp_path / "a").keys() == files(tmp_path / "b").keys()
    assert files(tmp_path / "a") != files(tmp_path / "b")


def test_videos_show_what_was_drawn(tmp_path: Path) -> None:
    path = write_dataset(tmp_path, n=2, seed=3, frames=8, size=196)
    records = [json.loads(line) for line in path.read_text().splitlines()]
    renderer = Renderer()
    for record, (scene, turns) in zip(records, samples(2, 3, 8, 196), strict=True):
        assert record["category"] == record["turns"][0]["category"] == turns[0].category
        assert [t["answer"] for t in record["turns"]] == [t.answer for t in turns]
        drawn = renderer(pack([scene]))[0].permute(0, 2, 3, 1).numpy()
        with av.open(str(tmp_path / record["video"])) as clip:
            stream = clip.streams.video[0]
            assert stream.average_rate == 2
            assert stream.codec_context.pix_fmt == "yuv420p"
            shown = np.stack([f.to_ndarray(format="rgb24") for f in clip.decode(stream)])
        assert shown.shape == drawn.shape
        assert np.abs(shown.astype(int) - drawn).mean() < 4


def test_images_are_exact(tmp_path: Path) -> None:
    path = write_dataset(tmp_path, n=1, seed=3, frames=1, size=168)
    record = json.loads(path.read_text())
    scene, _ = next(iter(samples(1, 3, 1, 168)))
    drawn = Renderer()(pack([scene]))[0, 0].permute(1, 2, 0).numpy()
    assert np.array_equal(np.array(Image.open(tmp_path / record["image"])), drawn)


@pytest.mark.parametrize(
    ("settings", "fix"), [({"n": 0}, "n=0"), ({"seed": -1}, "seed"), ({"frames": 3}, "even")]
)
def test_wrong_settings_name_the_fix(tmp_path: Path, settings: dict, fix: str) -> None:
    with pytest.raises(ValueError, match=fix):
        write_dataset(tmp_path, **settings)


def test_the_sample_is_ten_seconds_with_questions() -> None:
    assert len(sample_questions()) >= 4
    assert {t["category"] for t in sample_turns()} >= {"code", "colour", "direction", "count"}
    with av.open(str(sample_video())) as clip:
        stream = clip.streams.video[0]
        assert (stream.width, stream.height) == (280, 280)
        assert stream.frames / stream.average_rate == 10
    assert sample_video().stat().st_size < 1_200_000


def test_the_template_puts_vision_before_text() -> None:
    assert CHAT_TEMPLATE.index("<|video_pad|>") < CHAT_TEMPLATE.index("part['text']")
