"""`purekv reference`: data and checkpoint."""

from pathlib import Path

import pytest

from purekv.evals import read_samples
from purekv.media import read_audio

VIDEO = ("--media", "video", "--frames", "6", "--size", "168")
IMAGE = ("--media", "image", "--size", "168", "--count", "2")


def test_the_data_set_of_a_suite(cli, cli_json, tmp_path: Path) -> None:
    arguments = ["--n", "4", "--seed", "7", "--tokens", "576", "--level", "easy"]
    code, out, _ = cli("reference", "data", str(tmp_path / "a"), *arguments)
    assert code == 0
    samples = read_samples(out.strip())
    assert len(samples) == 4
    for sample in samples:
        assert all(path.is_file() for path in sample.videos + sample.images)
    path = str(tmp_path / "b" / "data.jsonl")
    assert cli_json("reference", "data", str(tmp_path / "b"), *arguments) == {
        "data": path, "n": 4, "seed": 7, "level": "easy", "tokens": "576"
    }  # fmt: skip
    names = [path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.*")]
    assert len(names) > 4
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize(
    ("arguments", "made", "media"),
    [
        (VIDEO, {"media": "video", "frames": 6, "size": 168, "count": 1}, "video"),
        (IMAGE, {"media": "image", "frames": 1, "size": 168, "count": 2}, "images"),
        (("--media", "page"), {"media": "page", "frames": 1, "size": 280, "count": 1}, "image"),
    ],
)
def test_data_of_one_kind(cli_json, tmp_path: Path, arguments, made, media) -> None:
    found = cli_json("reference", "data", str(tmp_path), "--n", "2", *arguments)
    path = str(tmp_path / "data.jsonl")
    assert found == {"data": path, "n": 2, "seed": 0, "level": "standard"} | made
    assert [sample.media for sample in read_samples(path)] == [media] * 2


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ("--n 0", "at least 1"),
        ("--seed -1", "0 or more"),
        ("--tokens 3k", "576, 1k, 2k, 4k"),
        ("--level mild", "easy, standard, hard"),
        ("--media film", "video, image or page"),
        ("--media video --frames 3", "even"),
        ("--media video --frames 1", "even"),
        ("--media video --size 100", "multiple of 28"),
        ("--media image --size 896", "448"),
        ("--media video --count 0", "1 to 16"),
        ("--media image --frames 4", "leave it out"),
        ("--media page --tokens 1k", "leave one of them out"),
        ("--frames 20", "--media video"),
        ("--size 280", "--media video"),
        ("--count 2", "--media video"),
        ("--n two", "--n"),
    ],
)
def test_bad_values_are_one_line(cli, tmp_path: Path, arguments: str, names: str) -> None:
    directory = tmp_path / "data"
    code, out, err = cli("reference", "data", str(directory), *arguments.split(), "--json")
    errors = [line for line in err.splitlines() if not line.endswith(" ...")]
    assert (code, out) == (2, "")
    assert len(errors) == 1, err
    assert errors[0].startswith("error: ")
    assert names in errors[0]
    assert not directory.exists()


def test_files_of_others_are_left_alone(cli, tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text("years of work")
    code, _, err = cli("reference", "data", str(tmp_path), "--n", "1", *VIDEO)
    assert code == 2
    assert "name a new directory" in err.splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["data.jsonl"]
    assert (tmp_path / "data.jsonl").read_text() == "years of work"


def test_weights_that_are_not_there_are_said_in_a_line(cli, tmp_path: Path) -> None:
    code, _, err = cli("reference", "build", str(tmp_path / "a"), "--weights", str(tmp_path))
    assert code == 2
    assert "no trained weights in" in err
    assert not (tmp_path / "a").exists()


def test_build_leaves_a_folder_of_other_files_alone(cli, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    code, _, err = cli("reference", "build", str(tmp_path))
    assert code == 2
    assert "error:" in err
    assert (tmp_path / "thesis.txt").exists()


def test_videos_with_sound(cli, cli_json, tmp_path: Path) -> None:
    video = ("--media", "video", "--frames", "12", "--size", "168")
    found = cli_json("reference", "data", str(tmp_path / "a"), "--n", "1", "--audio", *video)
    assert found["audio"] is True
    (sample,) = read_samples(found["data"])
    wave = read_audio(sample.videos[0])
    assert wave is not None
    assert wave.any()  # a silent track would be no sound
    code, _, err = cli("reference", "data", str(tmp_path / "b"), "--audio", *VIDEO)
    assert code == 2
    assert "12 frames or more" in err.splitlines()[-1]
