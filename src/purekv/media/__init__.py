"""Media at the edge of the library: files in, uint8 RGB frames and waves out. Knows nothing of
models."""

from purekv.media.audio import read_audio
from purekv.media.files import check_file
from purekv.media.image import read_image
from purekv.media.video import Clip, Progress, check_sampling, read_frames, read_video

__all__ = [
    "Clip",
    "Progress",
    "check_file",
    "check_sampling",
    "read_audio",
    "read_frames",
    "read_image",
    "read_video",
]
