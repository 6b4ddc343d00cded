"""Asking a batch of samples all their turns, with the gold answers as history.

A later turn is asked after the *gold* earlier answers, so that every method sees the same chat,
and on the cache that the first prompt left: compressed, if PureKV is attached to the model.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin
from transformers.cache_utils import Cache

from purekv.errors import PureKVError
from purekv.evals.samples import Sample
from purekv.media import Clip, read_image
from purekv.session import read_clip


@dataclass(frozen=True)
class Batch:
    """Samples ready to be asked, by as many methods as one likes."""

    prompts: list[list[str]]
    """Prompt text of each turn and sample, the gold history included."""
    inputs: dict[str, Tensor]
    """Of the first turn, on the model's device."""


def prepare_samples(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    samples: Sequence[Sample],
    read: Callable[[Sample], list[Clip]] | None = None,
) -> Batch:
    """Tokens and pixels of a left-padded batch.

    Args:
        samples: all with the same number of turns.
        read: how a sample's videos become frames (default: decoded from their files).
    """
    turns = len(samples[0].turns)
    if any(len(sample.turns) != turns for sample in samples):
        raise PureKVError("the samples of a batch must have the same number of turns")
    messages = [_messages(sample) for sample in samples]
    prompts = [[_render(processor, chat[: 2 * t + 1]) for chat in messages] for t in range(turns)]
    inputs = _first_inputs(processor, samples, prompts[0], read)
    return Batch(prompts, dict(inputs.to(model.device)))


def answer_samples(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    batch: Batch,
    *,
    cache: Cache | None = None,
    max_new_tokens: int = 16,
) -> list[list[str]]:
    """Greedy answers to every turn of each sample.

    Args:
        cache: of the first prompt, as `SharedPrefill` makes them; it grows.
    """
    inputs: dict[str, Any] = dict(batch.inputs)
    if cache is not None:
        inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        inputs["past_key_values"] = cache
    answers: list[list[str]] = [[] for _ in batch.prompts[0]]
    for turn, prompts in enumerate(batch.prompts):
        output = model.generate(
            **inputs, max_new_tokens=max_new_tokens, do_sample=False, return_dict_in_generate=True
        )
        seen = inputs["input_ids"].shape[1]
        texts = processor.batch_decode(output.sequences[:, seen:], skip_special_tokens=True)
        for row, text in enumerate(texts):
            answers[row].append(text.strip())
        if turn + 1 < len(batch.prompts):
            cache = output.past_key_values
            cache.crop(seen - cache.get_seq_length())  # forget the model's own answer
            new = [
                after[len(before) :]
                for before, after in zip(prompts, batch.prompts[turn + 1], strict=True)
            ]
            inputs = _next_inputs(processor, inputs, new)
            inputs["past_key_values"] = cache
    return answers


def _messages(sample: Sample) -> list[dict[str, Any]]:
    """Alternating questions and gold answers; the first question carries the media."""
    messages: list[dict[str, Any]] = []
    for turn in sample.turns:
        messages.append({"role": "user", "content": [{"type": "text", "text": turn.question}]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": turn.answer}]})
    media = [{"type": "video"} for _ in sample.videos] + [{"type": "image"} for _ in sample.images]
    messages[0]["content"] = media + messages[0]["content"]
    return messages


def _render(processor: ProcessorMixin, messages: list[dict[str, Any]]) -> str:
    return processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def _first_inputs(
    processor: ProcessorMixin,
    samples: Sequence[Sample],
    prompts: list[str],
    read: Callable[[Sample], list[Clip]] | None,
) -> Any:
    media: dict[str, Any] = {}
    images = [read_image(path) for sample in samples for path in sample.images]
    if images:
        media["images"] = images
    clips: list[Clip] = []
    for sample in samples:
        clips += read(sample) if read else [read_clip(processor, path) for path in sample.videos]
    if clips:
        media["videos"] = [clip.frames for clip in clips]
        media["videos_kwargs"] = {
            "video_metadata": [clip.metadata for clip in clips],
            "do_sample_frames": False,
        }
    return processor(text=prompts, padding=True, return_tensors="pt", **media)


def _next_inputs(
    processor: ProcessorMixin, before: dict[str, Any], texts: list[str]
) -> dict[str, Tensor]:
    """The ids so far, and behind them each row's new text, padded on the left."""
    new = processor.tokenizer(
        texts, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt"
    )
    device = before["input_ids"].device
    return {
        name: torch.cat([before[name], new[name].to(device)], dim=1)
        for name in ("input_ids", "attention_mask")
    }
