"""Which releases of vLLM the plugin was tested with."""

import re

from purekv.errors import PureKVError

OLDEST, NEWEST = (0, 29), (0, 32)
"""Both included, with all their patch releases."""


def check_version(version: str) -> None:
    """Refuse a vLLM that the plugin was never run with.

    Raises:
        PureKVError: the version is older or newer, or cannot be read.
    """
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers and OLDEST <= (int(numbers[1]), int(numbers[2])) <= NEWEST:
        return
    tested = " to ".join(".".join(map(str, one)) for one in (OLDEST, NEWEST))
    raise PureKVError(
        f"vLLM {version} was not tested with purekv[vllm]; install one of {tested}, or serve "
        "without compression"
    )
