"""Offline batches: every sample's questions answered in a chat on the compressed cache.

Unlike an evaluation, later turns follow the model's *own* answers, and a sample that cannot be read
or asked is an answer of its own kind. Where the work is done, `actors.py` knows.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from purekv.attach import PureKV
from purekv.config import PureKVConfig
from purekv.errors import PureKVError
from purekv.evals.samples import Sample
from purekv.fit import check_for_model
from purekv.loading import Checkpoint
from purekv.media import check_sampling, read_image
from purekv.session import Chat, read_clip


@dataclass(frozen=True)
class Answers:
    """One sample's, or why there are not all of them."""

    id: str
    answers: tuple[str, ...] = ()
    """To its turns; with an error, to those before it."""
    visual_tokens: int | None = None
    """Of the prompt. As the bytes: None if an error came before its prefill had ended."""
    kv_bytes_full: int | None = None
    """Bytes that the uncompressed cache would hold at the end of the prefill."""
    kv_bytes_kept: int | None = None
    """Bytes allocated by all cache tensors at the end of the prefill."""
    error: str | None = None

    def to_dict(self) -> dict[str, Any]:
        data = {**asdict(self), "answers": list(self.answers)}
        if self.error is None:
            del data["error"]
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Answers":
        return cls(**{**data, "answers": tuple(data["answers"])})


@dataclass(frozen=True)
class AnswerJob:
    """What a process needs to know to answer samples; calling it loads the model."""

    checkpoint: str
    """Directory or hub id."""
    config: PureKVConfig
    device: str = "auto"
    dtype: str = "auto"
    max_new_tokens: int = 64
    fps: float | None = None
    """Sampled frames a second. As the next two: None, the model's own."""
    max_frames: int | None = None
    max_pixels: int | None = None
    """Of each frame or image."""

    def __post_init__(self) -> None:
        check_sampling(
            1.0 if self.fps is None else self.fps, 1 if self.max_frames is None else self.max_frames
        )
        for name in ("max_new_tokens", "max_pixels"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise PureKVError(f"{name}={value}; it must be at least 1")

    def __call__(self) -> "Answering":
        return Answering(self)


class Answering:
    """A loaded model that answers one sample after another."""

    def __init__(self, job: AnswerJob) -> None:
        self.job = job
        checkpoint = Checkpoint.find(job.checkpoint)
        self.processor = checkpoint.processor()
        self.model = checkpoint.model(device=job.device, dtype=job.dtype)
        check_for_model(job.config, self.model)

    def __call__(self, sample: Sample) -> Answers:
        """What is wrong with a sample is recorded, memory that it does not fit included. Raises
        only where the device has failed, which no later sample would survive."""
        answers: list[str] = []
        found: dict[str, Any] = {}
        try:
            chat = self._chat(sample)
            with PureKV(self.job.config)(self.model) as run:
                for turn in sample.turns:
                    answer = chat.ask(turn.prompt, max_new_tokens=self.job.max_new_tokens)
                    answers.append(answer.text)
                    if not found:
                        report = run.report
                        found = {
                            "visual_tokens": sum(report.visual_tokens),
                            "kv_bytes_full": report.kv_bytes_full,
                            "kv_bytes_kept": report.kv_bytes_kept,
                        }
        except torch.AcceleratorError:
            raise
        except Exception as error:
            found["error"] = _reason(error)
        return Answers(sample.id, tuple(answers), **found)

    def _chat(self, sample: Sample) -> Chat:
        clips = [
            read_clip(
                self.processor,
                path,
                fps=self.job.fps,
                max_frames=self.job.max_frames,
                max_pixels=self.job.max_pixels,
            )
            for path in sample.videos
        ]
        images = [read_image(path) for path in sample.images]
        return Chat(
            self.model,
            self.processor,
            videos=clips,
            images=images,
            max_pixels=self.job.max_pixels,
        )


def _reason(error: Exception) -> str:
    """In one line; what is not ours says what it is."""
    text = " ".join(str(error).split())
    return text if isinstance(error, PureKVError) else f"{type(error).__name__}: {text}"
