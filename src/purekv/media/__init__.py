"""Media at the edge of the library: files in, uint8 RGB frames out. Knows nothing of models."""

from purekv.media.image import read_image
from purekv.media.video import Clip, read_video

__all__ = ["Clip", "read_image", "read_video"]
