"""Whatever is wrong with a request: exit code 2 and one line on stderr that names the fix."""

import json
from pathlib import Path

import pytest
from PIL import Image

from tests.media.clips import write_audio

GOOD = ("--video", "{video}", "--ask", "What?", "--model", "{model}")

CASES = {
    "no media": (("--ask", "What?", "--model", "{model}"), "give --video FILE or --image FILE"),
    "no question": (("--video", "{video}", "--model", "{model}"), "give --ask"),
    "blank question": (("--video", "{video}", "--ask", " "), "give --ask"),
    "missing video": (("--video", "{tmp}/none.mp4", "--ask", "?"), "not found"),
    "empty video": (("--video", "{tmp}/empty.mp4", "--ask", "?"), "is empty"),
    "directory": (("--video", "{tmp}", "--ask", "?"), "is a directory"),
    "corrupt video": (
        ("--video", "{tmp}/corrupt.mp4", "--ask", "?", "--model", "{model}"),
        "not a video that can be decoded",
    ),
    "audio only": (
        ("--video", "{tmp}/sound.m4a", "--ask", "?", "--model", "{model}"),
        "no video in",
    ),
    "missing image": (("--image", "{tmp}/none.png", "--ask", "?"), "not found"),
    "corrupt image": (("--image", "{tmp}/corrupt.png", "--ask", "?"), "not an image"),
    "second image corrupt": (
        ("--image", "{tmp}/good.png", "{tmp}/corrupt.png", "--ask", "?"),
        "not an image",
    ),
    "range behind the end": ((*GOOD, "--start", "99"), "is 8.00 s long"),
    "empty range": ((*GOOD, "--start", "2", "--end", "2"), "no frames between"),
    "fps zero": ((*GOOD, "--fps", "0"), "fps=0"),
    "no frames": ((*GOOD, "--max-frames", "0"), "max_frames=0"),
    "no pixels": ((*GOOD, "--max-pixels", "0"), "max_pixels=0"),
    "no new tokens": ((*GOOD, "--max-new-tokens", "0"), "max_new_tokens=0"),
    "budget 0": ((*GOOD, "--budget", "0"), "budget=0"),
    "budget 1": ((*GOOD, "--budget", "1"), "ambiguous"),
    "budget 1.5": ((*GOOD, "--budget", "1.5"), "budget=1.5"),
    "budget abc": ((*GOOD, "--budget", "abc"), "not a number"),
    "budget nan": ((*GOOD, "--budget", "nan"), "budget=nan"),
    "budget above the tokens": ((*GOOD, "--budget", "5000"), "5000"),
    "unknown scorer": ((*GOOD, "--scorer", "magic"), "clie"),
    "layer out of range": ((*GOOD, "--source-layers", "9"), "9"),
    "layer not a number": ((*GOOD, "--source-layers", "1,x"), "auto"),
    "window zero": ((*GOOD, "--window", "0"), "window=0"),
    "window word": ((*GOOD, "--window", "x"), "question"),
    "unknown device": ((*GOOD, "--device", "abacus"), "auto, cpu, cuda"),
    "unsupported device": ((*GOOD, "--device", "meta"), "use auto, cpu, cuda"),
    "empty model": (("--video", "{video}", "--ask", "?", "--model", ""), "name is empty"),
    "placeholder": (
        ("--video", "{video}", "--model", "{model}", "--ask", "a <|video_pad|>?"),
        "stands for media",
    ),
    "missing GPU": ((*GOOD, "--device", "cuda:7"), "not on this machine"),
    "unknown dtype": ((*GOOD, "--dtype", "int3"), "float32"),
    "missing model": (("--video", "{video}", "--ask", "?", "--model", "{tmp}/none"), "not found"),
    "no checkpoint": (("--video", "{video}", "--ask", "?", "--model", "{tmp}"), "config.json"),
    "model is a file": (
        ("--video", "{video}", "--ask", "?", "--model", "{tmp}/good.png"),
        "is a file",
    ),
    "unsupported family": (
        ("--video", "{video}", "--ask", "?", "--model", "{tmp}/llama"),
        "'llama' is not supported",
    ),
    "missing weights": (
        ("--video", "{video}", "--ask", "?", "--model", "{tmp}/weightless"),
        "cannot load",
    ),
    "broken weights": (
        ("--video", "{video}", "--ask", "?", "--model", "{tmp}/broken"),
        "cannot load",
    ),
    "unknown option": ((*GOOD, "--bugdet", "0.2"), "--bugdet"),
    "not a number": ((*GOOD, "--fps", "fast"), "--fps"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Path:
    folder = tmp_path_factory.mktemp("bad")
    (folder / "empty.mp4").touch()
    (folder / "corrupt.mp4").write_bytes(b"\0\1\2" * 999)
    (folder / "corrupt.png").write_bytes(b"\0\1\2" * 999)
    Image.new("RGB", (32, 32)).save(folder / "good.png")
    write_audio(folder / "sound.m4a")
    (folder / "llama").mkdir()
    (folder / "llama" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    for name in ("weightless", "broken"):
        (folder / name).mkdir()
        for file in checkpoint.iterdir():
            if file.suffix != ".safetensors":
                (folder / name / file.name).write_bytes(file.read_bytes())
    (folder / "broken" / "model.safetensors").write_bytes(b"not weights")
    return folder


@pytest.mark.parametrize("case", CASES)
def test_one_line_and_exit_code_2(cli, case, folder, video, checkpoint) -> None:
    words, message = CASES[case]
    names = {"tmp": folder, "video": video, "model": checkpoint}
    code, out, err = cli("run", *(word.format(**names) for word in words), "--json")
    errors = [line for line in err.splitlines() if not line.endswith(" ...")]
    assert code == 2
    assert out == ""
    assert len(errors) == 1, err
    assert errors[0].startswith("error: ")
    assert message in errors[0]


def test_unknown_verb(cli) -> None:
    code, _, err = cli("rnu")
    assert code == 2
    assert "Did you mean 'run'?" in err


def test_debug_shows_where(checkpoint, video) -> None:
    from purekv import PureKVError
    from purekv.cli import main

    with pytest.raises(PureKVError):
        main(["run", "--video", str(video), "--ask", "?", "--budget", "0", "--debug"])


def test_interrupt(cli, monkeypatch, checkpoint, video) -> None:
    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("purekv.session.read_clip", interrupted)
    code, out, err = cli("run", "--video", video, "--ask", "?", "--model", checkpoint)
    assert (code, out) == (130, "")
    assert "Traceback" not in err
