"""Model families: one file each, one line here."""

from typing import Any

from purekv.errors import PureKVError
from purekv.families.base import Family, Placeholder, token_runs
from purekv.families.gemma3 import Gemma3
from purekv.families.generic import HOW_TO_ADD, Generic
from purekv.families.glm4v import Glm4V
from purekv.families.internvl import InternVL
from purekv.families.llava_next_video import LlavaNextVideo
from purekv.families.llava_onevision import LlavaOneVision
from purekv.families.qwen2_5_omni import Qwen25Omni
from purekv.families.qwen2_5_vl import Qwen25VL
from purekv.families.qwen2_vl import Qwen2VL
from purekv.families.qwen3_vl import Qwen3VL
from purekv.families.smolvlm import SmolVLM
from purekv.families.text import Text
from purekv.families.video_llama_3 import VideoLlama3
from purekv.families.videollama2 import VideoLLaMA2

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
    VideoLLaMA2(),
    Text(),
)
GENERIC = Generic()
"""Of models that no family names."""

FAMILIES: dict[str, Family] = {name: family for family in _FAMILIES for name in family.model_types}


PARTS = {"qwen2_5_omni": "give PureKV the part that reads: PureKV(config)(model.thinker)"}
"""What to do about models of which one part is served."""
READERS = {"qwen2_5_omni": "thinker_config"}
"""Which config of such a model is that part's; its weights load from the whole checkpoint."""


def for_config(config: Any) -> Family:
    """The family of a model config; one that fits any model, if none names it.

    Raises:
        PureKVError: the config does not say what stands for pixels.
    """
    model_type = getattr(config, "model_type", None)
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    if model_type in PARTS:
        raise PureKVError(f"{model_type!r} is several models in one; {PARTS[model_type]}")
    if Generic.fits(config):
        return GENERIC
    raise PureKVError(
        f"model type {model_type!r} is not supported, and its config names no image_token_id or "
        f"video_token_id; supported are {', '.join(FAMILIES)}. To add it, {HOW_TO_ADD}"
    )


__all__ = ["FAMILIES", "GENERIC", "Family", "Placeholder", "for_config", "token_runs"]
