"""`purekv serve`: vLLM's OpenAI-compatible server with compression on."""

import os
from importlib.util import find_spec
from typing import Annotated

import typer

from purekv.cli import options
from purekv.cli.arguments import parse_budget, parse_source_layers
from purekv.cli.errors import explains_errors
from purekv.cli.options import COMPRESSION, option
from purekv.errors import PureKVError

PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True}
"""Everything else is an option of `vllm serve`."""


@explains_errors
def serve(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Hub id or directory.")],
    budget: Annotated[
        str, option(COMPRESSION, "Prompt tokens to keep: a share (0.2) or a count (2000).")
    ] = "0.2",
    scorer: options.Scorer = "clie",
    source_layers: options.SourceLayers = "auto",
    window: Annotated[
        int, option(COMPRESSION, "The prompt's last tokens, which observe and stay.")
    ] = 32,
    sinks: Annotated[int, option(COMPRESSION, "The prompt's first tokens, which stay.")] = 4,
    min_tokens: Annotated[
        int, option(COMPRESSION, "Prompts with fewer tokens are left as they are.")
    ] = 256,
    debug: options.Debug = False,
) -> None:
    """Serve MODEL with vLLM, compressing prompts; further options are those of vllm serve."""
    from purekv.serving.command import ENVIRONMENT, server_command, this_device
    from purekv.serving.counters import share_counters
    from purekv.serving.settings import ServingConfig

    settings = ServingConfig(
        budget=parse_budget(budget),
        scorer=scorer,
        source_layers=parse_source_layers(source_layers),
        window=window,
        sinks=sinks,
        min_tokens=min_tokens,
    )
    device = this_device()
    command = server_command(model, settings, context.args, device)
    if find_spec("vllm") is None:
        raise PureKVError("vLLM is not installed; run pip install 'purekv[vllm]'")
    share_counters()
    for name, value in ENVIRONMENT[device].items():
        os.environ.setdefault(name, value)
    os.execv(command[0], command)  # signals reach the server itself
