"""A prompt and its media to a model's inputs: one call of the processor, with sound where the model
hears."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL.Image import Image
from transformers import BatchFeature, ProcessorMixin, Qwen2_5OmniProcessor

from purekv.errors import PureKVError
from purekv.media import Clip
from purekv.upstream import woven_sound

RATE = 16000
"""Samples a second of a clip's wave."""


def hears(processor: ProcessorMixin) -> bool:
    """Whether the model takes the sound of a video."""
    own = getattr(processor, "hears", None)  # VideoLLaMA2: only some checkpoints do
    return isinstance(processor, Qwen2_5OmniProcessor) if own is None else own


def model_inputs(
    processor: ProcessorMixin,
    texts: Sequence[str],
    clips: Sequence[Clip] = (),
    images: Sequence[Image] = (),
    *,
    videos_kwargs: Mapping[str, Any] | None = None,
    images_kwargs: Mapping[str, Any] | None = None,
) -> BatchFeature:
    """A padded batch of prompts, chat template applied, with the media that they show in turn.

    Where the model hears, so does it the clips' waves: VideoLLaMA2 behind each video (silence where
    there is none), Qwen2.5-Omni woven into it. Omni gets no sound if no clip has any.

    Raises:
        PureKVError: clips with sound, whose model has one frame rate, were sampled at several.
    """
    media: dict[str, Any] = {}
    if images:
        media |= {"images": list(images), "images_kwargs": dict(images_kwargs or {})}
    weaves = False
    if clips:
        media["videos"] = [clip.frames for clip in clips]
        media["videos_kwargs"] = {
            "video_metadata": [clip.metadata for clip in clips],
            "do_sample_frames": False,
            **(videos_kwargs or {}),
        }
        if hears(processor):
            weaves = isinstance(processor, Qwen2_5OmniProcessor) and _any_sound(clips)
            if weaves:
                media |= woven_sound(processor, [_wave(clip) for clip in clips])
                media["videos_kwargs"]["fps"] = _one_rate(clips)
            elif not isinstance(processor, Qwen2_5OmniProcessor):
                media["audio"] = [clip.wave for clip in clips]
    inputs = processor(text=list(texts), padding=True, return_tensors="pt", **media)
    if weaves:
        inputs["use_audio_in_video"] = True  # the model places tokens of both in time
    return inputs


def _any_sound(clips: Sequence[Clip]) -> bool:
    return any(clip.wave is not None for clip in clips)


def _wave(clip: Clip) -> np.ndarray:
    """Its sound, or as much silence."""
    if clip.wave is not None:
        return clip.wave
    return np.zeros(round(len(clip.frames) / clip.fps * RATE), np.float32)


def _one_rate(clips: Sequence[Clip]) -> float:
    rates = {clip.fps for clip in clips}
    if len(rates) > 1:
        raise PureKVError(
            f"videos with sound at {', '.join(f'{rate:g}' for rate in sorted(rates))} frames a "
            "second in one prompt; sample them at one rate, e.g. --fps 1"
        )
    return rates.pop()
