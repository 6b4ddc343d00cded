"""Video files to evenly spaced RGB frames, decoded as a stream.

Frame i of a clip is the picture on screen at `start + i / fps` seconds, found by presentation
timestamps, so a variable frame rate needs no special case. Only the sampled frames are kept and
converted; stretches without a sample are skipped by seeking to the next key frame the file lists.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
from av.container import InputContainer
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from transformers.video_utils import VideoMetadata

from purekv.errors import PureKVError
from purekv.media.files import check_file

Progress = Callable[[int, int], None]

_SEEK_MARGIN = 1.0  # seconds by which a file's index, kept in decoding order, may run early
_GRACE = 1.0  # seconds by which a container may overstate its length before we call it cut off


@dataclass(frozen=True)
class Clip:
    """Sampled frames and what a model's processor needs to know about them.

    frames: uint8 [num_frames, height, width, 3], RGB.
    fps: sampled frames per second of video, at most the file's own rate.
    wave: its sound as `read_audio` makes it, if it was asked for and there is any.
    has_sound: whether the file has a sound track.
    """

    frames: np.ndarray
    fps: float
    wave: np.ndarray | None = None
    has_sound: bool = False

    @property
    def metadata(self) -> VideoMetadata:
        """The clip described as a video of its own: frame i at second i / fps.

        For a processor called with `do_sample_frames=False`; its `sampled_fps` is exactly `fps`.
        """
        num_frames, height, width, _ = self.frames.shape
        return VideoMetadata(
            total_num_frames=num_frames,
            fps=self.fps,
            width=width,
            height=height,
            duration=num_frames / self.fps,
            video_backend="pyav",
            frames_indices=list(range(num_frames)),
        )


def read_video(
    path: str | Path,
    *,
    fps: float = 2.0,
    min_frames: int = 1,
    max_frames: int = 768,
    multiple_of: int = 1,
    start: float = 0.0,
    end: float | None = None,
    max_pixels: int | None = None,
    progress: Progress | None = None,
) -> Clip:
    """Sample the seconds from `start` to `end` (None: to the end of the file) at `fps`.

    When that gives fewer than `min_frames` or more than `max_frames` (never more than the range
    holds), the rate changes so that the limit spans the whole range. The number of frames is
    rounded down to `multiple_of` (a model's temporal patch) where there are enough. Frames of more
    than `max_pixels` are shrunk while decoding, in proportion. `progress(done, total)` counts
    frames.

    Raises PureKVError for a file that cannot be decoded, a range without frames, and settings that
    make no sense.
    """
    path = Path(path)
    check_file(path, "video")
    check_sampling(fps, max_frames, start, end)
    try:
        with _opened(path) as (container, stream):
            has_sound = bool(container.streams.audio)
            span = _Span.of(container, stream, start, end, path)
            times, rate = _sample_times(span, fps, min_frames, max_frames, multiple_of)
            frames = []
            for frame in _frames_at(container, stream, times, path):
                frames.append(_to_rgb(frame, max_pixels))
                if progress is not None:
                    progress(len(frames), len(times))
    except av.error.FFmpegError as error:
        raise PureKVError(
            f"not a video that can be decoded: {path} ({error.strerror}); "
            "re-encode it, e.g. as H.264 mp4"
        ) from error
    return Clip(np.stack(frames), rate, has_sound=has_sound)


def read_frames(path: str | Path, choose: Callable[[int], Sequence[int]]) -> np.ndarray:
    """The frames whose numbers, ascending, `choose` answers for a video of that many frames.

    For models that sample by number, not by time. uint8 [num_frames, height, width, 3].

    Raises PureKVError for a file that cannot be decoded.
    """
    path = Path(path)
    check_file(path, "video")
    try:
        with _opened(path) as (container, stream):
            packets = container.demux(stream)
            stamps = sorted(packet.pts for packet in packets if packet.pts is not None)
            if not stamps:
                raise PureKVError(f"no frames in {path}; re-encode it, e.g. as H.264 mp4")
            container.seek(0)
            times = [stamps[number] * _tick(stream) for number in choose(len(stamps))]
            frames = [_to_rgb(frame, None) for frame in _frames_at(container, stream, times, path)]
    except av.error.FFmpegError as error:
        raise PureKVError(
            f"not a video that can be decoded: {path} ({error.strerror}); "
            "re-encode it, e.g. as H.264 mp4"
        ) from error
    return np.stack(frames)


def check_sampling(
    fps: float, max_frames: int, start: float = 0.0, end: float | None = None
) -> None:
    """Raise PureKVError for what makes no sense whatever the video."""
    if not (math.isfinite(fps) and fps > 0):
        raise PureKVError(f"fps={fps:g}; it must be above 0, e.g. 2")
    if max_frames < 1:
        raise PureKVError(f"max_frames={max_frames}; it must be at least 1")
    if not (math.isfinite(start) and start >= 0):
        raise PureKVError(f"start={start:g}; it must be 0 or more seconds")
    if end is not None and not end > start:
        raise PureKVError(f"no frames between start={start:g} and end={end:g} s; end must be later")


@contextmanager
def _opened(path: Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    """A file and its first stream of moving pictures."""
    with av.open(str(path)) as container:
        stream = _video_stream(container, path)
        try:
            yield container, stream
        finally:
            # Threads may be decoding frames that nobody will read. PyAV frees the decoder with the
            # GIL held, and waits for them; one that reports an error to PyAV's log (which other
            # libraries switch on) would wait for the GIL. Here they are waited for without it.
            stream.codec_context.flush_buffers()


def _video_stream(container: InputContainer, path: Path) -> VideoStream:
    """The first stream of moving pictures; an audio file's cover art does not count."""
    for stream in container.streams.video:
        if not stream.disposition & Disposition.attached_pic:
            stream.thread_type = "AUTO"
            return stream
    raise PureKVError(f"no video in {path}, only {_kinds(container)}; give a file with pictures")


def _tick(stream: VideoStream) -> float:
    """Seconds in one unit of the stream's timestamps."""
    assert stream.time_base is not None
    return float(stream.time_base)


def _kinds(container: InputContainer) -> str:
    kinds = sorted({stream.type for stream in container.streams if stream.type != "video"})
    return " and ".join(kinds) or "still pictures"


@dataclass(frozen=True)
class _Span:
    """The part of a stream to sample, in seconds of the stream's own clock, and its frame rate."""

    begin: float
    length: float
    rate: float

    @classmethod
    def of(
        cls,
        container: InputContainer,
        stream: VideoStream,
        start: float,
        end: float | None,
        path: Path,
    ) -> "_Span":
        origin = (stream.start_time or 0) * _tick(stream)
        duration = _duration(container, stream, origin)
        if start >= duration:
            raise PureKVError(
                f"no frames from start={start:g} s: {path} is {duration:.2f} s long; start earlier"
            )
        stop = duration if end is None else min(end, duration)
        rate = stream.average_rate or stream.guessed_rate
        return cls(origin + start, stop - start, float(rate) if rate else 1 / duration)


def _duration(container: InputContainer, stream: VideoStream, origin: float) -> float:
    """Seconds of video: the stream's own word, else where its last packet ends."""
    if stream.duration:
        return stream.duration * _tick(stream)
    if container.duration:
        container.seek(container.duration)
    ends = [
        packet.pts + (packet.duration or 1)
        for packet in container.demux(stream)
        if packet.pts is not None
    ]
    container.seek(0)
    if not ends:
        raise av.error.InvalidDataError(0, "no frames")
    return max(ends) * _tick(stream) - origin


def _sample_times(
    span: _Span, fps: float, min_frames: int, max_frames: int, multiple_of: int
) -> tuple[list[float], float]:
    """Seconds at which to sample, and the rate they make."""
    available = max(round(span.length * span.rate), 1)
    # Containers give durations to about one frame: 7.99 s at 2 fps is 16 frames, not 15.
    wanted = math.floor((span.length + 1 / span.rate) * fps)
    count = min(max(wanted, min_frames), max_frames, available)
    if count >= multiple_of:
        count -= count % multiple_of
    rate = fps if wanted - multiple_of < count <= wanted else count / span.length
    return [span.begin + index / rate for index in range(count)], rate


def _frames_at(
    container: InputContainer, stream: VideoStream, times: list[float], path: Path
) -> Iterator[VideoFrame]:
    """For each of the ascending times, the last frame whose timestamp is not later."""
    decoder = container.decode(stream)
    shown: VideoFrame | None = None
    upcoming = next(decoder, None)
    half_tick = _tick(stream) / 2
    for time in times:
        if upcoming is not None and _key_frame_between(stream, upcoming.time, time):
            container.seek(round((time - _SEEK_MARGIN) / _tick(stream)), stream=stream)
            decoder = container.decode(stream)
            shown, upcoming = None, next(decoder, None)
        while upcoming is not None and (shown is None or upcoming.time <= time + half_tick):
            shown, upcoming = upcoming, next(decoder, None)
        if shown is None:
            raise PureKVError(f"no frame of {path} can be decoded at {time:.2f} s; re-encode it")
        if upcoming is None and time > (last := _end(shown, stream)) + _GRACE:
            raise PureKVError(
                f"{path} is cut off: nothing decodes after {last:.2f} s; "
                f"end there (--end {last:.2f}) or use a complete copy"
            )
        yield shown


def _key_frame_between(stream: VideoStream, now: float, later: float) -> bool:
    """Whether seeking towards `later` would skip ahead of `now`, as the file's index says."""
    entry = stream.index_entries.search_timestamp(round((later - _SEEK_MARGIN) / _tick(stream)))
    return entry >= 0 and stream.index_entries[entry].timestamp * _tick(stream) > now


def _end(frame: VideoFrame, stream: VideoStream) -> float:
    return frame.time + (frame.duration or 0) * _tick(stream)


def _to_rgb(frame: VideoFrame, max_pixels: int | None) -> np.ndarray:
    """The frame upright, uint8 [height, width, 3], of at most about `max_pixels`."""
    width, height, interpolation = frame.width, frame.height, "BILINEAR"
    if max_pixels is not None and width * height > max_pixels:
        scale = math.sqrt(max_pixels / (width * height))
        width, height = max(round(width * scale), 1), max(round(height * scale), 1)
        interpolation = "AREA"
    pixels = frame.reformat(width, height, format="rgb24", interpolation=interpolation).to_ndarray()
    return np.rot90(pixels, round(frame.rotation / 90))
