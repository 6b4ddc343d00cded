"""What every benchmark records: machine, versions, commit, and rows written in one piece."""

import argparse
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch
import transformers

RESULTS = Path(__file__).parent / "results"


def device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def commit() -> str:
    """The checked-out commit, or $PUREKV_COMMIT where the tree came without its history."""
    if name := os.environ.get("PUREKV_COMMIT"):
        return name
    command = ["git", "-C", str(RESULTS), "rev-parse", "--short", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def settings(arguments: argparse.Namespace) -> dict[str, str]:
    """The command line's choices, without places on this machine."""
    return {k: str(v) for k, v in vars(arguments).items() if k not in ("out", "model")}


def write_results(path: Path, config: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    data = {
        "device": device_name(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": commit(),
        "config": config,
        "rows": rows,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(json.dumps(data, indent=1) + "\n")
    temporary.replace(path)
