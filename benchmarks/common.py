"""What every benchmark script shares."""

import argparse
from pathlib import Path
from typing import Any

from purekv.bench import results, write

RESULTS = Path(__file__).parent / "results"


def settings(arguments: argparse.Namespace) -> dict[str, str]:
    """The command line's choices, without places on this machine."""
    places = ("out", "model", "weights", "plans")
    return {k: str(v) for k, v in vars(arguments).items() if k not in places}


def write_results(path: Path, config: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    write(path, results(config, rows))
