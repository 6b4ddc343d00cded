"""The same questions to the compressed and, if asked for, to the uncompressed model."""

import platform
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from PIL.Image import Image
from transformers import PreTrainedModel, ProcessorMixin
from transformers import __version__ as transformers_version

import purekv
from purekv import PureKV, PureKVConfig
from purekv.cache import cache_bytes
from purekv.cli.progress import Step, step
from purekv.media import Clip
from purekv.memory import PeakMemory, release
from purekv.report import PhaseTimer
from purekv.session import Answer, Chat
from purekv.upstream import cache_of


@dataclass(frozen=True)
class Request:
    """What was asked of which model."""

    model: PreTrainedModel
    processor: ProcessorMixin
    videos: list[Clip]
    images: list[Image]
    questions: list[str]
    max_pixels: int | None
    max_new_tokens: int
    decode_video: float
    """Seconds spent reading the videos."""


@dataclass(frozen=True)
class Outcome:
    """One model's answers and what they cost. Bytes are those at the end of the first prefill."""

    answers: list[Answer]
    visual_tokens: int
    kept_visual_tokens: int
    """Those that each (layer, KV head) keeps."""
    prefill_per_layer: list[str]
    """As in the report."""
    certificate: list[dict[str, Any]] | None
    """As in the report."""
    kv_bytes_full: int
    kv_bytes_kept: int
    seconds: dict[str, float]
    peak_bytes: int

    @property
    def compression(self) -> float:
        return self.kv_bytes_full / self.kv_bytes_kept

    def to_dict(self) -> dict[str, Any]:
        return {
            "answers": [answer.text for answer in self.answers],
            "visual_tokens": self.visual_tokens,
            "kept_visual_tokens": self.kept_visual_tokens,
            "kv_bytes_full": self.kv_bytes_full,
            "kv_bytes_kept": self.kv_bytes_kept,
            "compression": self.compression,
            "seconds": self.seconds,
            "peak_bytes": self.peak_bytes,
        }


@dataclass(frozen=True)
class Result:
    compressed: Outcome
    dense: Outcome | None

    @property
    def agreement(self) -> float | None:
        """Share of equal answer tokens, position by position, over the longer answers."""
        if self.dense is None:
            return None
        pairs = [
            pair
            for ours, theirs in zip(self.compressed.answers, self.dense.answers, strict=True)
            for pair in zip_longest(ours.token_ids, theirs.token_ids)
        ]
        return sum(ours == theirs for ours, theirs in pairs) / max(len(pairs), 1)


def answer(request: Request, config: PureKVConfig, *, compare: bool) -> Result:
    """Run the chat with PureKV and, with `compare`, once more without."""
    if compare:
        _warm_up(request.model)
    with step("answering with PureKV") as progress:
        compressed = _answer_compressed(request, config, progress)
    if not compare:
        return Result(compressed, None)
    release()
    with step("answering without") as progress:
        return Result(compressed, _answer_dense(request, compressed.visual_tokens, progress))


def to_json(
    result: Result, request: Request, config: PureKVConfig, model_name: str
) -> dict[str, Any]:
    """The object that `--json` prints."""
    data: dict[str, Any] = {
        "questions": request.questions,
        **result.compressed.to_dict(),
        "prefill_per_layer": result.compressed.prefill_per_layer,
        "certificate": result.compressed.certificate,
        "budget": config.budget,
        "config": config.to_dict(),
        "model": model_name,
        "device": str(request.model.device),
        "dtype": str(request.model.dtype).removeprefix("torch."),
        "versions": {
            "purekv": purekv.__version__,
            "torch": torch.__version__,
            "transformers": transformers_version,
            "python": platform.python_version(),
        },
    }
    if result.dense is not None:
        data["dense"] = result.dense.to_dict()
        data["agreement"] = result.agreement
    return data


def _answer_compressed(request: Request, config: PureKVConfig, progress: Step) -> Outcome:
    with PeakMemory(request.model.device) as peak, PureKV(config)(request.model) as run:
        answers = _ask(request, progress)
        report = run.report
    return Outcome(
        answers,
        sum(report.visual_tokens),
        sum(report.kept_visual_tokens),
        report.prefill_per_layer,
        report.to_dict()["certificate"],
        report.kv_bytes_full,
        report.kv_bytes_kept,
        {"decode_video": request.decode_video, **report.seconds},
        peak.bytes,
    )


def _answer_dense(request: Request, visual_tokens: int, progress: Step) -> Outcome:
    kv_bytes: list[int] = []

    def after_forward(module: Any, args: Any, output: Any) -> None:
        if not kv_bytes:
            kv_bytes.append(cache_bytes(cache_of(output)))

    model = request.model
    hook = model.register_forward_hook(after_forward)
    try:
        with PeakMemory(model.device) as peak, PhaseTimer(model) as timer:
            answers = _ask(request, progress)
            seconds = {"decode_video": request.decode_video, **timer.seconds}
    finally:
        hook.remove()
    num_layers = model.config.get_text_config().num_hidden_layers
    return Outcome(
        answers,
        visual_tokens,
        visual_tokens,
        ["dense"] * num_layers,
        None,
        kv_bytes[0],
        kv_bytes[0],
        seconds,
        peak.bytes,
    )


def _ask(request: Request, progress: Step) -> list[Answer]:
    chat = Chat(
        request.model,
        request.processor,
        videos=request.videos,
        images=request.images,
        max_pixels=request.max_pixels,
    )
    answers = []
    for question in request.questions:
        answers.append(chat.ask(question, max_new_tokens=request.max_new_tokens))
        progress.advance(len(answers), len(request.questions))
    return answers


def _warm_up(model: PreTrainedModel) -> None:
    """Let neither side of a comparison pay for what the first forward of a process sets up."""
    with torch.no_grad():
        model(input_ids=torch.zeros(1, 8, dtype=torch.long, device=model.device))
