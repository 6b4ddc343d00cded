"""The command that starts vLLM's server with compression on."""

import json
import sys
from collections.abc import Sequence

import torch

from purekv.errors import PureKVError
from purekv.serving.settings import KEY, ServingConfig

WORKERS = {
    "cpu": "purekv.serving.worker.CompactingCPUWorker",
    "cuda": "purekv.serving.cuda_worker.CompactingCUDAWorker",
}
"""By vLLM's name of the device."""

REQUIRED = {
    "cpu": ("--no-enable-prefix-caching", "--enforce-eager"),
    "cuda": ("--no-enable-prefix-caching", "--attention-backend", "FLASH_ATTN"),
}
"""Without which compression refuses to start; see `purekv.serving.refusals`."""

ENVIRONMENT = {"cpu": {}, "cuda": {"VLLM_USE_V2_MODEL_RUNNER": "0"}}
"""Likewise."""


def this_device() -> str:
    """Where a vLLM that fits this torch serves; its own answer takes seconds to import."""
    return "cuda" if torch.version.cuda and torch.cuda.is_available() else "cpu"


def server_command(
    model: str, settings: ServingConfig, rest: Sequence[str], device: str = "cpu"
) -> list[str]:
    """What to execute on that device; `rest` are options of `vllm serve`, the user's own.

    Raises:
        PureKVError: `rest` sets what compression has to set.
    """
    for name in ("--worker-cls", "--additional-config"):
        if any(word.split("=")[0].replace("_", "-") == name for word in rest):
            raise PureKVError(
                f"{name} is set by purekv serve; leave it out, or start vllm serve as "
                "docs/serving.md shows"
            )
    return [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model),
        *("--worker-cls", WORKERS[device]),
        *("--additional-config", json.dumps({KEY: settings.to_dict()})),
        *REQUIRED[device],
        *rest,
    ]
