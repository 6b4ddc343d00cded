"""What every file of results records: the machine, versions, commit, settings, rows."""

import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch
import transformers

from purekv.errors import PureKVError

_HERE = Path(__file__).parent


def device_name(device: torch.device | None = None) -> str:
    """Of a device; by default of the GPU if there is one."""
    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def commit() -> str:
    """The checked-out commit, or $PUREKV_COMMIT where the tree came without its history."""
    if name := os.environ.get("PUREKV_COMMIT"):
        return name
    # An installed copy may lie inside some other project's checkout, which does not track it.
    tracked = _git("ls-files", Path(__file__).name)
    return (_git("rev-parse", "--short", "HEAD") if tracked else "") or "unknown"


def _git(*words: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(_HERE), *words], capture_output=True, text=True, check=False
        )
    except OSError:
        return ""
    return done.stdout.strip()


def results(
    config: dict[str, Any], rows: list[dict[str, Any]], device: torch.device | None = None
) -> dict[str, Any]:
    return {
        "device": device_name(device),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": commit(),
        "config": config,
        "rows": rows,
    }


def check_out(path: Path) -> None:
    """Raises PureKVError where `write` would fail."""
    if path.is_dir():
        raise PureKVError(f"{path} is a directory; name a file, e.g. {path / 'bench.json'}")
    parent = next(parent for parent in path.absolute().parents if parent.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise PureKVError(f"{path} cannot be written; name a file in a folder that is yours")


def write(path: Path, data: dict[str, Any]) -> None:
    """Write a JSON file in one piece."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)
