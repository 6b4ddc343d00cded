"""What can be wrong with a media file before any decoder looks at it."""

from pathlib import Path

from purekv.errors import PureKVError


def check_file(path: Path, kind: str) -> None:
    """Raise PureKVError unless `path` is a non-empty file; `kind` is "video" or "image"."""
    if not path.exists():
        raise PureKVError(f"{kind} file not found: {path}; check the path")
    if path.is_dir():
        raise PureKVError(f"{path} is a directory; name one {kind} file inside it")
    if path.stat().st_size == 0:
        raise PureKVError(f"{kind} file is empty: {path}; copy or download it again")
