"""What is measured: a checkpoint on a real video, or random weights at a published shape."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor
from transformers import PreTrainedModel

from purekv.bench import rows
from purekv.bench.clips import clip_inputs, decode_video
from purekv.bench.shapes import random_inputs, random_model, shape_config
from purekv.errors import PureKVError
from purekv.loading import DTYPES, Checkpoint, find_device

QUESTION = "What happens in this video, and what is it about?"


class Subject(Protocol):
    """A model and the prompts for it."""

    config: Any
    """The model's."""
    name: str

    def media_rows(self, repeats: int) -> Iterator[dict[str, Any]]:
        """Read the media; what that took, if `repeats` is not 0."""
        ...

    def inputs(self, tokens: int | None) -> dict[str, Tensor]:
        """One row's arguments of the model's forward, on the CPU: about so many visual tokens."""
        ...

    def model(self) -> PreTrainedModel:
        """On its device; loads the weights."""
        ...


class RandomSubject:
    """Random weights and pixels. `tokens` must be given."""

    def __init__(self, shape: str, device: str, dtype: str) -> None:
        self.config = shape_config(shape)
        self.name = shape
        self._device = find_device(device)
        _check_dtype(dtype)
        if dtype == "auto":
            dtype = "float32" if self._device.type == "cpu" else "bfloat16"
        self._dtype = DTYPES[dtype]

    def media_rows(self, repeats: int) -> Iterator[dict[str, Any]]:
        if repeats:
            yield rows.row("decode_video", skipped="random pixels were never a file; use --video")

    def inputs(self, tokens: int | None) -> dict[str, Tensor]:
        assert tokens is not None
        return random_inputs(self.config, tokens)

    def model(self) -> PreTrainedModel:
        return random_model(self.name, self._device, self._dtype)


class VideoSubject:
    """A checkpoint and a video."""

    def __init__(self, checkpoint: Checkpoint, video: Path, device: str, dtype: str) -> None:
        _check_dtype(dtype)
        self.config = checkpoint.config
        path = Path(checkpoint.name)
        self.name = path.name if path.is_dir() else checkpoint.name
        self._checkpoint, self._video = checkpoint, video
        self._device, self._dtype = device, dtype
        self._processor = checkpoint.processor()

    def media_rows(self, repeats: int) -> Iterator[dict[str, Any]]:
        self._clip, measured = decode_video(self._processor, self._video, repeats)
        if measured:
            frames = len(self._clip.frames)
            yield rows.row("decode_video", frames=frames, **rows.timing(measured))

    def inputs(self, tokens: int | None) -> dict[str, Tensor]:
        return clip_inputs(self._processor, self.config, self._clip, tokens, QUESTION)

    def model(self) -> PreTrainedModel:
        return self._checkpoint.model(device=self._device, dtype=self._dtype)


def _check_dtype(dtype: str) -> None:
    if dtype != "auto" and dtype not in DTYPES:
        raise PureKVError(f"dtype={dtype!r} is unknown; use auto, {', '.join(DTYPES)}")
