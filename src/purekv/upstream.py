"""What transformers has renamed: the KV cache, `past_key_values` up to 5.23 and `cache` since; the
sound of a video."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from transformers.cache_utils import Cache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, create_causal_mask

_NAMES = ("cache", "past_key_values")

CACHE: str = next(
    name for name in _NAMES if name in inspect.signature(create_causal_mask).parameters
)
"""The keyword under which forwards and `generate` take a cache."""


def cache_in(arguments: Mapping[str, Any]) -> Cache | None:
    """The cache among a forward's arguments, under its name of today or of before."""
    return next((arguments[name] for name in _NAMES if arguments.get(name) is not None), None)


def cache_of(output: Mapping[str, Any]) -> Cache:
    """The cache in the output of a forward or of `generate`."""
    cache = cache_in(output)
    assert cache is not None
    return cache


def masks_like(known: str, name: str) -> None:
    """Let models make masks for the attention `name` as they do for the one that is `known`."""
    # Only the class's table is looked at, and its `register` cannot be undone.
    table = ALL_MASK_ATTENTION_FUNCTIONS._global_mapping
    table[name] = table[known]


def no_masks(name: str) -> None:
    """Undo `masks_like`."""
    del ALL_MASK_ATTENTION_FUNCTIONS._global_mapping[name]


def woven_sound(processor: Any, waves: Sequence[Any]) -> dict[str, Any]:
    """Arguments of Qwen2.5-Omni's processor: waves [samples], one for each video, woven into it."""
    if hasattr(processor, "load_audio_from_video"):
        links = {"load_audio_from_video": True, "audio_from_video_indices": [*range(len(waves))]}
    else:  # of before
        links = {"use_audio_in_video": True}
    return {"audio": list(waves), **links}
