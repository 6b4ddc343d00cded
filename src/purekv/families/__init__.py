"""Model families: one file each, one line here."""

from typing import Any

from purekv.errors import PureKVError
from purekv.families.base import Family, Placeholder
from purekv.families.gemma3 import Gemma3
from purekv.families.glm4v import Glm4V
from purekv.families.internvl import InternVL
from purekv.families.llava_next_video import LlavaNextVideo
from purekv.families.llava_onevision import LlavaOneVision
from purekv.families.qwen2_5_omni import Qwen25Omni
from purekv.families.qwen2_5_vl import Qwen25VL
from purekv.families.qwen2_vl import Qwen2VL
from purekv.families.qwen3_vl import Qwen3VL
from purekv.families.smolvlm import SmolVLM
from purekv.families.video_llama_3 import VideoLlama3

_FAMILIES: tuple[Family, ...] = (
    Qwen2VL(),
    Qwen25VL(),
    Qwen3VL(),
    Qwen25Omni(),
    InternVL(),
    LlavaOneVision(),
    LlavaNextVideo(),
    Glm4V(),
    SmolVLM(),
    Gemma3(),
    VideoLlama3(),
)

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
