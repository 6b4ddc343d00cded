"""Sound, of its own file or of a video's, to one wave."""

from itertools import chain
from pathlib import Path

import av
import numpy as np

from purekv.errors import PureKVError
from purekv.media.files import check_file


def read_audio(
    path: str | Path, rate: int = 16000, start: float = 0.0, end: float | None = None
) -> np.ndarray | None:
    """Float32 [samples] in -1 to 1 at `rate` per second, channels mixed; None without sound.

    From second `start` to `end` (None: to the end of the file).

    Raises PureKVError for a file that cannot be decoded.
    """
    path = Path(path)
    check_file(path, "audio")
    try:
        with av.open(str(path)) as container:
            if not container.streams.audio:
                return None
            resampler = av.AudioResampler(format="s16", layout="mono", rate=rate)
            parts = [
                part.to_ndarray()[0]
                for frame in chain(container.decode(audio=0), [None])  # None: what is left over
                for part in resampler.resample(frame)
            ]
    except av.error.FFmpegError as error:
        raise PureKVError(
            f"sound that cannot be decoded: {path} ({error.strerror}); re-encode it, e.g. as wav"
        ) from error
    if not parts:
        return None
    stop = None if end is None else round(end * rate)
    return np.concatenate(parts)[round(start * rate) : stop].astype(np.float32) / 2**15
