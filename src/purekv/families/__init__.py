"""Model families: one file each, one line here."""

from typing import Any

from purekv.errors import PureKVError
from purekv.families.base import Family, Placeholder
from purekv.families.qwen2_5_vl import Qwen25VL
from purekv.families.videollama2 import VideoLLaMA2

_FAMILIES: tuple[Family, ...] = (Qwen25VL(), VideoLLaMA2())

FAMILIES: dict[str, Family] = {name: family for family in _FAMILIES for name in family.model_types}


def for_config(config: Any) -> Family:
    """The family of a model config.

    Raises:
        PureKVError: no family serves this model type.
    """
    model_type = getattr(config, "model_type", None)
    if model_type not in FAMILIES:
        raise PureKVError(
            f"model type {model_type!r} is not supported; supported are {', '.join(FAMILIES)}"
        )
    return FAMILIES[model_type]


__all__ = ["FAMILIES", "Family", "Placeholder", "for_config"]
