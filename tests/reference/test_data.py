"""Datasets: the same bytes again, readable by anyone, and close to the pixels that were drawn."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from purekv import PureKVError
from purekv.evals import read_media, read_samples
from purekv.reference import sample_questions, sample_video, write_dataset
from purekv.reference.data import (
    CHECKSUMS,
    SUITES,
    Geometry,
    _drawing,
    image,
    is_complete,
    page,
    samples,
    suite,
    video,
)
from purekv.reference.model import make_processor
from purekv.reference.render import Renderer, pack
from purekv.reference.sample import sample_turns
from purekv.reference.scene import LEVELS
from purekv.reference.tokens import CHAT_TEMPLATE
from tests.tiny import tiny_tokenizer

SMALL = [video(3, 6), video(4, 6, 2), image(6), image(6, 3), page(6), page(7, 2)]


@pytest.fixture(autouse=True, scope="module")
def renderer() -> Iterator[Renderer]:
    """One for all data sets: what it reads takes longer than what is drawn here."""
    shared = Renderer()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("purekv.reference.render.Renderer", lambda: shared)
        yield shared


def files(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def media_of(record: dict) -> list[str]:
    (key,) = set(record) & {"video", "videos", "image", "images"}
    assert isinstance(record[key], list) == key.endswith("s")
    return record[key] if key.endswith("s") else [record[key]]


# The same bytes


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("geometry", SMALL, ids=str)
def test_the_same_bytes_again(tmp_path: Path, geometry: Geometry, level: str) -> None:
    seen: list[tuple[int, int]] = []
    for name in ("a", "b"):
        write_dataset(
            tmp_path / name, n=3, seed=1, geometry=geometry, level=level,
            progress=lambda done, total: seen.append((done, total)),
        )  # fmt: skip
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert seen == [(1, 3), (2, 3), (3, 3)] * 2
    write_dataset(tmp_path / "c", n=3, seed=2, geometry=geometry, level=level)
    assert not set(files(tmp_path / "a").values()) & set(files(tmp_path / "c").values())


@pytest.mark.parametrize("name", SUITES)
def test_suites_write_the_same_bytes_again(tmp_path: Path, name: str) -> None:
    n = 6 if name in ("576", "1k") else 2  # of the longest, not every geometry
    for folder in ("a", "b"):
        path = write_dataset(tmp_path / folder, n=n, seed=1, tokens=name)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    target = int(name[:-1]) * 1000 if name.endswith("k") else int(name)
    assert all(target <= r["visual_tokens"] <= 1.03 * target for r in records(path))
    assert {file.name for file in (tmp_path / "a").iterdir()} <= {
        "data.jsonl", CHECKSUMS, "videos", "images"
    }  # fmt: skip


def flip(path: Path) -> None:
    """One bit of its first byte."""
    whole = path.read_bytes()
    path.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])


def test_checksums_detect_damage(tmp_path: Path) -> None:
    write_dataset(tmp_path, n=2, seed=1, geometry=video(3, 6))
    intact = files(tmp_path)
    sums = json.loads(intact[CHECKSUMS])["files"]
    assert set(sums) == set(intact) - {CHECKSUMS}
    for name in intact:
        for damage in (flip, Path.unlink):
            assert is_complete(tmp_path)
            damage(tmp_path / name)
            assert not is_complete(tmp_path)
            if name == CHECKSUMS:  # without it nobody knows whose the files are
                (tmp_path / name).write_bytes(intact[name])
            elif damage is flip:  # nobody knows who changed it
                (tmp_path / name).unlink()
            write_dataset(tmp_path, n=2, seed=1, geometry=video(3, 6))
            assert files(tmp_path) == intact


def test_what_is_whole_is_not_drawn_again(tmp_path: Path) -> None:
    path = write_dataset(tmp_path, n=2, seed=1, geometry=image(6))
    written = path.stat().st_mtime_ns
    drawn: list[int] = []
    again = write_dataset(
        tmp_path, n=2, seed=1, geometry=image(6), progress=lambda done, total: drawn.append(done)
    )
    assert (again, drawn, path.stat().st_mtime_ns) == (path, [], written)


# Other data in the same directory


@pytest.mark.parametrize(
    "other",
    [
        {"n": 1}, {"seed": 2}, {"level": "hard"}, {"geometry": image(6, 2)},
        {"turns": (0, 1, 0)}, {"choices": 1.0},
    ],
    ids=str,
)  # fmt: skip
def test_other_arguments_replace_the_data_set_and_nothing_else(tmp_path: Path, other: dict) -> None:
    first = {"n": 3, "seed": 1, "geometry": video(3, 6)}
    write_dataset(tmp_path / "a", **first)
    (tmp_path / "a" / "notes.txt").write_text("mine")
    (tmp_path / "a" / "videos" / "holiday.mp4").write_text("mine")
    write_dataset(tmp_path / "a", **first | other)
    write_dataset(tmp_path / "b", **first | other)
    found = files(tmp_path / "a")
    assert found.pop("notes.txt") == found.pop("videos/holiday.mp4") == b"mine"
    assert found == files(tmp_path / "b")


def test_an_emptied_folder_goes(tmp_path: Path) -> None:
    write_dataset(tmp_path, n=1, geometry=video(3, 6))
    write_dataset(tmp_path, n=1, geometry=image(6))
    assert sorted(path.name for path in tmp_path.iterdir()) == [CHECKSUMS, "data.jsonl", "images"]


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError])
def test_a_stopped_run_leaves_what_was_there(tmp_path: Path, stop: type[BaseException]) -> None:
    def progress(done: int, total: int) -> None:
        if done == 2:
            raise stop

    with pytest.raises(stop):
        write_dataset(tmp_path, n=3, geometry=video(3, 6), progress=progress)
    assert files(tmp_path) == {}
    write_dataset(tmp_path, n=3, geometry=video(3, 6))
    whole = files(tmp_path)
    with pytest.raises(stop):
        write_dataset(tmp_path, n=3, geometry=video(3, 6), level="hard", progress=progress)
    assert files(tmp_path) == whole
    assert is_complete(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [CHECKSUMS, "data.jsonl", "videos"]


@pytest.mark.parametrize("moved", range(4))
def test_a_run_stopped_while_it_moves_files_is_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moved: int
) -> None:
    write_dataset(tmp_path / "a", n=3, geometry=video(3, 6))
    write_dataset(tmp_path / "b", n=2, geometry=image(6))
    replace, count = Path.replace, 0

    def stopping(path: Path, target: Path) -> Path:
        nonlocal count
        count += 1
        if count > moved:
            raise KeyboardInterrupt
        return replace(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", stopping)
        with pytest.raises(KeyboardInterrupt):
            write_dataset(tmp_path / "a", n=2, geometry=image(6))
    assert not (tmp_path / "a" / "data.jsonl").exists()  # it would name files that are not there
    write_dataset(tmp_path / "a", n=2, geometry=image(6))
    assert files(tmp_path / "a") == files(tmp_path / "b")


@pytest.mark.parametrize("name", ["data.jsonl", CHECKSUMS, "videos/0-00000.mp4"])
def test_files_of_others_are_left_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / "videos").mkdir()
    (tmp_path / name).write_text("precious")
    with pytest.raises(PureKVError, match=rf"holds a {name}.*new directory"):
        write_dataset(tmp_path, n=1, geometry=video(3, 6))
    assert files(tmp_path) == {name: b"precious"}
    with pytest.raises(PureKVError, match="is a file"):
        write_dataset(tmp_path / name, n=1, geometry=video(3, 6))


@pytest.mark.parametrize("name", ["data.jsonl", "images/0-00000.png"])
@pytest.mark.parametrize("seed", [0, 3])
def test_what_was_changed_is_left_alone(tmp_path: Path, name: str, seed: int) -> None:
    write_dataset(tmp_path, n=2, geometry=image(6))
    (tmp_path / name).write_text("precious")
    found = files(tmp_path)
    with pytest.raises(PureKVError, match=rf"{name} was changed since.*; move it away[^\n]*$"):
        write_dataset(tmp_path, n=1, seed=seed, geometry=image(6))
    assert files(tmp_path) == found
    (tmp_path / name).unlink()
    write_dataset(tmp_path, n=1, seed=seed, geometry=image(6))
    assert is_complete(tmp_path)


@pytest.mark.parametrize("folder", ["images", "videos"])
@pytest.mark.parametrize("kind", ["link", "file"])
def test_folders_that_are_none_are_refused(tmp_path: Path, folder: str, kind: str) -> None:
    directory, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    geometry = image(6) if folder == "images" else video(3, 6)
    write_dataset(directory, n=1, geometry=geometry)
    (directory / folder).rename(elsewhere)
    if kind == "link":
        (directory / folder).symlink_to(elsewhere)
    else:
        (directory / folder).write_text("precious")
    found = files(tmp_path)
    for other in (image(6), video(3, 6)):
        with pytest.raises(PureKVError, match=rf"{folder} is a {kind}, not a folder; name a new"):
            write_dataset(directory, n=2, geometry=other)
    assert files(tmp_path) == found
    assert (directory / folder).is_symlink() == (kind == "link")


@pytest.mark.parametrize("whole", [False, True])
def test_what_a_killed_run_left_goes(tmp_path: Path, whole: bool) -> None:
    if whole:
        write_dataset(tmp_path, n=1, geometry=image(6))
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        pass
    dead = tmp_path / f"{_drawing(ended.pid)}ab_c12"
    others = [
        tmp_path / name
        for name in (
            f"{_drawing(os.getpid())}abc", ".drawing-elsewhere-1-abc", ".drawing-mine", "drawing"
        )
    ]  # fmt: skip
    for folder in (dead, *others):
        (folder / "images").mkdir(parents=True)
        (folder / "images" / "half.png").write_text("half")
    write_dataset(tmp_path, n=1, geometry=image(6))
    assert not dead.exists()
    assert all((folder / "images" / "half.png").exists() for folder in others)


def test_checksums_cannot_name_files_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    directory = tmp_path / "data"
    write_dataset(directory, n=1, geometry=image(6))
    noted = json.loads((directory / CHECKSUMS).read_text())
    noted["files"] |= {"../thesis.txt": "0", "images/../../thesis.txt": "0", "images": "0"}
    (directory / CHECKSUMS).write_text(json.dumps(noted))
    write_dataset(directory, n=1, seed=3, geometry=image(6))
    assert (tmp_path / "thesis.txt").read_text() == "precious"


# What is written


def test_videos_show_what_was_drawn(tmp_path: Path, renderer: Renderer) -> None:
    for geometry in (video(4, 7), video(3, 6, 2)):
        folder = tmp_path / str(geometry.count)
        path = write_dataset(folder, n=2, seed=3, geometry=geometry)
        drawn = samples(2, 3, geometry)
        for record, sample in zip(records(path), drawn, strict=True):
            pixels = renderer(pack(sample.scenes)).permute(0, 1, 3, 4, 2).numpy()
            for name, expected in zip(media_of(record), pixels, strict=True):
                with av.open(str(folder / name)) as clip:
                    stream = clip.streams.video[0]
                    assert stream.average_rate == 2
                    assert stream.codec_context.pix_fmt == "yuv420p"
                    shown = np.stack([f.to_ndarray(format="rgb24") for f in clip.decode(stream)])
                assert shown.shape == expected.shape
                assert np.abs(shown.astype(int) - expected).mean() < 4


@pytest.mark.parametrize("geometry", [image(6), image(6, 2), page(8, 2)], ids=str)
def test_images_are_exact(tmp_path: Path, renderer: Renderer, geometry: Geometry) -> None:
    path = write_dataset(tmp_path, n=1, seed=3, geometry=geometry)
    (record,), (sample,) = records(path), samples(1, 3, geometry)
    pixels = renderer(pack(sample.scenes))[:, 0].permute(0, 2, 3, 1).numpy()
    for name, expected in zip(media_of(record), pixels, strict=True):
        assert np.array_equal(np.array(Image.open(tmp_path / name)), expected)


def test_lines_say_what_was_asked(tmp_path: Path) -> None:
    path = write_dataset(tmp_path, n=12, seed=3, tokens="576", level="easy", choices=0.5)
    drawn = list(suite("576", 12, 3, "easy", choices=0.5))
    read = read_samples(path)
    assert len({record["id"] for record in records(path)}) == 12
    for record, sample, asked in zip(records(path), drawn, read, strict=True):
        assert record["category"] == record["turns"][0]["category"] == sample.turns[0].category
        assert [t["answer"] for t in record["turns"]] == [t.answer for t in sample.turns]
        # What evaluation asks and expects is what training saw.
        assert [t.prompt for t in asked.turns] == [t.prompt for t in sample.turns]
        assert [t.answer for t in asked.turns] == [t.reply for t in sample.turns]
        assert [t.category for t in asked.turns] == [t.category for t in sample.turns]
        assert all(path.is_file() for path in asked.videos + asked.images)
    assert {len(turn.choices) for sample in read for turn in sample.turns} == {0, 4}


@pytest.mark.parametrize(
    "geometry",
    [geometry for parts in SUITES.values() for geometry, _ in parts if geometry.visual < 1100],
    ids=str,
)
def test_prompts_have_the_tokens_that_are_noted(tmp_path: Path, geometry: Geometry) -> None:
    """Neither decoder nor processor drops frames or shrinks them."""
    path = write_dataset(tmp_path, n=1, seed=3, geometry=geometry)
    (record,), (sample,) = records(path), read_samples(path)
    processor = make_processor(tiny_tokenizer())
    media = read_media(processor, sample)
    grids = []
    if media.videos:
        assert all(len(clip.frames) == geometry.frames for clip in media.videos)
        seen = processor.video_processor(
            [clip.frames for clip in media.videos], do_sample_frames=False, return_tensors="pt"
        )
        grids = seen["video_grid_thw"]
    else:
        grids = processor.image_processor(list(media.images), return_tensors="pt")["image_grid_thw"]
    assert len(grids) == geometry.count
    assert int(grids.prod(1).sum()) // 4 == geometry.visual == record["visual_tokens"]


@pytest.mark.parametrize(
    ("settings", "fix"),
    [
        ({"n": 0}, "n=0: use at least 1"), ({"seed": -1}, "seed=-1: use 0 or more"),
        ({"level": "mild"}, "use one of easy, standard, hard"),
        ({"tokens": "3k"}, "use one of 576, 1k, 2k, 4k"),
    ],
)  # fmt: skip
def test_wrong_settings_name_the_fix(tmp_path: Path, settings: dict, fix: str) -> None:
    with pytest.raises(PureKVError, match=fix):
        write_dataset(tmp_path / "data", **settings)
    assert not (tmp_path / "data").exists()


# The sample


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
