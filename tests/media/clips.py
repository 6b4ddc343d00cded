"""Small real media files for tests, made on the spot."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np


def frame_pixels(index: int, height: int = 64, width: int = 96) -> np.ndarray:
    """A flat picture whose brightness tells the frame's index: uint8 [height, width, 3]."""
    return np.full((height, width, 3), 16 + index % 56 * 4, dtype=np.uint8)


def frame_index(pixels: np.ndarray) -> int:
    """The index that `frame_pixels` put into a decoded frame (modulo 56)."""
    return round((float(pixels.mean()) - 16) / 4)


def write_video(
    path: Path,
    *,
    num_frames: int = 48,
    rate: int = 12,
    size: tuple[int, int] = (64, 96),
    key_every: int = 12,
    ticks: list[int] | None = None,
    audio: bool = False,
) -> Path:
    """An H.264 file of `num_frames` flat frames; `ticks` (1/1000 s) makes the rate variable."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": "8", "bf": "0"})
        stream.height, stream.width = size
        stream.pix_fmt = "yuv420p"
        stream.gop_size = key_every
        sound = container.add_stream("aac", rate=16000, layout="mono") if audio else None
        if ticks is not None:
            stream.codec_context.time_base = stream.time_base = Fraction(1, 1000)
        for index in range(num_frames):
            frame = av.VideoFrame.from_ndarray(frame_pixels(index, *size), format="rgb24")
            if ticks is not None:
                frame.pts, frame.time_base = ticks[index], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if sound is not None:
            _add_silence(container, sound)
    return path


def write_audio(path: Path) -> Path:
    with av.open(str(path), "w") as container:
        _add_silence(container, container.add_stream("aac", rate=16000, layout="mono"))
    return path


def _add_silence(container: av.container.OutputContainer, stream: av.AudioStream) -> None:
    silence = av.AudioFrame.from_ndarray(
        np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono"
    )
    silence.sample_rate = 16000
    for index in range(16):
        silence.pts = index * 1024
        container.mux(stream.encode(silence))
    container.mux(stream.encode())
