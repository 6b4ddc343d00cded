"""The command that starts vLLM's server with compression on."""

import json
import sys
from collections.abc import Sequence

from purekv.errors import PureKVError
from purekv.serving.settings import KEY, ServingConfig

WORKER = "purekv.serving.worker.CompactingCPUWorker"

REQUIRED = ("--no-enable-prefix-caching", "--enforce-eager")
"""Without which compression refuses to start; see `purekv.serving.refusals`."""


def server_command(model: str, settings: ServingConfig, rest: Sequence[str]) -> list[str]:
    """What to execute; `rest` are options of `vllm serve`, the user's own.

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
        *("--worker-cls", WORKER),
        *("--additional-config", json.dumps({KEY: settings.to_dict()})),
        *REQUIRED,
        *rest,
    ]
