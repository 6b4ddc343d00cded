"""The words behind `--model_args`: which are PureKV's, and what they mean."""

import json
from collections.abc import Collection, Mapping
from dataclasses import fields
from typing import Any

from purekv.config import PureKVConfig
from purekv.errors import PureKVError

SETTINGS = tuple(field.name for field in fields(PureKVConfig))

DEFAULTS: dict[str, Any] = {"first_token": "compressed"}
"""Where an evaluation starts from something else than `PureKVConfig` does: most benchmarks want
one letter, and a first token that comes out of the prefill never feels the eviction."""


def split_arguments(
    arguments: Mapping[str, Any], models: Collection[str]
) -> tuple[PureKVConfig, dict[str, Any]]:
    """PureKV's config, and the arguments that are the model's.

    Args:
        arguments: as lmms-eval parsed them, or as text; lists as JSON: `source_layers=[2,8,14]`.
        models: names of the model's own arguments.

    Raises:
        PureKVError: an argument is neither's, or a setting is out of range.
    """
    settings, rest = dict(DEFAULTS), {}
    for name, value in arguments.items():
        if name in SETTINGS:
            settings[name] = _value(name, value)
        elif name in models:
            rest[name] = value
        else:
            raise PureKVError(
                f"unknown model argument {name!r}; PureKV's settings are {', '.join(SETTINGS)}; "
                f"the model's are {', '.join(models)}"
            )
    return PureKVConfig.from_dict(settings), rest


def _value(name: str, value: Any) -> Any:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            return value
    if name == "source_layers" and isinstance(value, int):
        return (value,)
    return value
