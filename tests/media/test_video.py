"""Frames are found by time; files that cannot serve are refused in one line."""

import random
import struct
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from transformers import Qwen2VLVideoProcessor

from purekv.errors import PureKVError
from purekv.media import read_video
from purekv.reference import sample_video
from tests.media.clips import frame_index, frame_pixels, write_audio, write_video


def indices(clip) -> list[int]:
    return [frame_index(frame) for frame in clip.frames]


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
def test_two_frames_a_second(tmp_path: Path, suffix: str) -> None:
    path = write_video(tmp_path / f"clip.{suffix}", num_frames=48, rate=12)
    clip = read_video(path, fps=2)
    assert indices(clip) == [0, 6, 12, 18, 24, 30, 36, 42]
    assert clip.frames.shape == (8, 64, 96, 3)
    assert clip.frames.dtype == np.uint8
    assert clip.metadata.sampled_fps == clip.fps == 2


def test_colours_survive(tmp_path: Path) -> None:
    clip = read_video(write_video(tmp_path / "clip.mp4", num_frames=2))
    assert np.abs(clip.frames[0].astype(int) - frame_pixels(0).astype(int)).max() <= 3


def test_sparse_sampling_seeks_to_the_same_frames(tmp_path: Path) -> None:
    dense = write_video(tmp_path / "dense.mp4", num_frames=480, rate=12, key_every=480)
    sparse = write_video(tmp_path / "sparse.mp4", num_frames=480, rate=12, key_every=12)
    settings = {"max_frames": 6, "start": 3.0, "end": 37.0}
    assert indices(read_video(sparse, **settings)) == indices(read_video(dense, **settings))


def test_limits_stretch_over_the_whole_range(tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.mp4", num_frames=48, rate=12)
    assert indices(read_video(path, max_frames=4)) == [0, 12, 24, 36]
    assert indices(read_video(path, min_frames=16)) == list(range(0, 48, 3))
    assert len(read_video(path, fps=1000).frames) == 48
    assert len(read_video(path, max_frames=5, multiple_of=2).frames) == 4


def test_range_is_a_clip_of_its_own(tmp_path: Path) -> None:
    clip = read_video(write_video(tmp_path / "clip.mp4", rate=12), start=1.5, end=3)
    assert indices(clip) == [18, 24, 30]
    assert clip.metadata.frames_indices == [0, 1, 2]


def test_variable_frame_rate_goes_by_the_clock(tmp_path: Path) -> None:
    ticks = [0, 100, 150, 900, 1000, 2500, 2600, 3000, 3100, 3200]
    path = write_video(tmp_path / "clip.mp4", num_frames=len(ticks), ticks=ticks)
    assert indices(read_video(path, fps=2))[:6] == [0, 2, 4, 4, 4, 5]


def test_single_frame(tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.mp4", num_frames=1)
    assert read_video(path, min_frames=4, multiple_of=2).frames.shape[0] == 1


def test_frames_are_shrunk_while_decoding(tmp_path: Path) -> None:
    path = write_video(tmp_path / "clip.mp4", num_frames=4, size=(128, 256))
    assert read_video(path, max_pixels=32 * 64).frames.shape[1:] == (32, 64, 3)


def test_phone_video_is_turned_upright(tmp_path: Path) -> None:
    data = bytearray(write_video(tmp_path / "clip.mp4", num_frames=12).read_bytes())
    matrix = data.index(b"tkhd") + 8 + (32 if data[data.index(b"tkhd") + 4] else 20) + 16
    data[matrix : matrix + 16] = struct.pack(">4i", 0, 1 << 16, 0, -(1 << 16))
    (tmp_path / "turned.mp4").write_bytes(data)
    assert read_video(tmp_path / "turned.mp4").frames.shape[1:] == (96, 64, 3)


def test_the_processor_sees_the_sampled_rate(tmp_path: Path) -> None:
    clip = read_video(write_video(tmp_path / "clip.mp4"), fps=2, multiple_of=2)
    processed = Qwen2VLVideoProcessor(patch_size=8)(
        [clip.frames],
        video_metadata=[clip.metadata],
        do_sample_frames=False,
        return_metadata=True,
    )
    assert processed["video_grid_thw"][0][0] == 4
    assert [metadata.sampled_fps for metadata in processed["video_metadata"]] == [2]


def test_progress_counts_frames(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    read_video(
        write_video(tmp_path / "c.mp4"), progress=lambda done, total: seen.append((done, total))
    )
    assert seen == [(index, 8) for index in range(1, 9)]


def test_soundtrack_is_ignored(tmp_path: Path) -> None:
    assert len(read_video(write_video(tmp_path / "clip.mp4", audio=True)).frames) == 8


def truncated(path: Path) -> Path:
    whole = write_video(path.with_name("whole.mp4"), num_frames=480)
    with (
        av.open(str(whole)) as source,
        av.open(str(path), "w", options={"movflags": "faststart"}) as copy,
    ):
        stream = copy.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.dts is not None:
                packet.stream = stream
                copy.mux(packet)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    return path


BAD_FILES = {
    "missing": (lambda path: path, "not found"),
    "directory": (lambda path: path.mkdir() or path, "is a directory"),
    "empty": (lambda path: path.touch() or path, "is empty"),
    "text": (lambda path: path.write_text("hello" * 99) and path, "not a video"),
    "zeros": (lambda path: path.write_bytes(bytes(4096)) and path, "not a video"),
    "audio": (write_audio, "no video in .* only audio"),
    "truncated": (truncated, "is cut off: nothing decodes after"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_file(tmp_path: Path, case: str) -> None:
    make, message = BAD_FILES[case]
    with pytest.raises(PureKVError, match=message) as error:
        read_video(make(tmp_path / "bad.mp4"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fps": 0.0}, "fps=0"),
        ({"fps": float("nan")}, "fps=nan"),
        ({"max_frames": 0}, "max_frames=0"),
        ({"start": -1.0}, "start=-1"),
        ({"start": 2.0, "end": 2.0}, "no frames between"),
        ({"start": 60.0}, "no frames from start=60 s: .* is 4.00 s long"),
    ],
    ids=str,
)
def test_bad_settings(tmp_path: Path, settings: dict, message: str) -> None:
    with pytest.raises(PureKVError, match=message):
        read_video(write_video(tmp_path / "clip.mp4"), **settings)


BROKEN = """
import random, sys
import av
from purekv import PureKVError
from purekv.media import read_video

av.logging.set_level(av.logging.ERROR)  # as importing torchvision did up to 0.24
for number in range(120):
    try:
        read_video(sys.argv[1], fps=25, max_frames=1 + number % 7, end=0.2 + 0.05 * (number % 11))
    except PureKVError:
        pass
"""


def test_threads_that_report_errors_do_not_hang_the_reader(tmp_path: Path) -> None:
    """They decode on when enough frames were read, and a damaged file gives them much to report."""
    data, choose = bytearray(sample_video().read_bytes()), random.Random(0)
    for _ in range(200):
        data[choose.randrange(len(data) // 8, len(data) * 7 // 8)] ^= 0xFF
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(data)
    subprocess.run([sys.executable, "-c", BROKEN, broken], timeout=120, check=True)
