"""Image files to RGB images."""

from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from purekv.errors import PureKVError
from purekv.media.files import check_file


def read_image(path: str | Path) -> Image.Image:
    """Read one image as 8-bit RGB, turned upright as its EXIF orientation says.

    Raises PureKVError for a missing, empty or unreadable file.
    """
    path = Path(path)
    check_file(path, "image")
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except UnidentifiedImageError as error:
        raise PureKVError(
            f"not an image that can be read: {path}; use PNG, JPEG or WebP"
        ) from error
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise PureKVError(f"image is corrupt: {path} ({error}); export it again") from error
