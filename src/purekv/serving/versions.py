"""Which releases of vLLM the plugin was tested with."""

import re

from purekv.errors import PureKVError

OLDEST = {"cpu": (0, 29), "cuda": (0, 32)}
NEWEST = (0, 32)
"""Both included, with all their patch releases. What an older release does on a GPU (another layout
of the cache, cascade attention) was not looked into."""


def check_version(version: str, oldest: tuple[int, int] = OLDEST["cpu"]) -> None:
    """Refuse a vLLM that the plugin was never run with.

    Raises:
        PureKVError: the version is older or newer, or cannot be read.
    """
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers and oldest <= (int(numbers[1]), int(numbers[2])) <= NEWEST:
        return
    ends = sorted({oldest, NEWEST})
    tested = " to ".join(".".join(map(str, one)) for one in ends)
    raise PureKVError(
        f"vLLM {version} was not tested with purekv[vllm]; install one of {tested}, or serve "
        "without compression"
    )
