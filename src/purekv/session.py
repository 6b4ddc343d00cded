"""A chat about videos and images that reads them once.

The first question carries the pixels. Later ones send only ids, on the cache that the earlier ones
left, whether PureKV compressed it or not. The past is never tokenised again: the next turn's ids
are appended to those already fed, so that the cache stays a prefix of the prompt.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor
from transformers import BatchFeature, PreTrainedModel, ProcessorMixin
from transformers.cache_utils import Cache

from purekv.errors import PureKVError
from purekv.inputs import hears, model_inputs
from purekv.media import Clip, Progress, read_audio, read_video
from purekv.upstream import CACHE, cache_of

_ANSWER = "[[the answer goes here]]"


@dataclass(frozen=True)
class Answer:
    """One generated turn."""

    text: str
    token_ids: list[int]
    """What the model generated, its end-of-turn token included."""


def read_clip(
    processor: ProcessorMixin,
    path: str | Path,
    *,
    fps: float | None = None,
    max_frames: int | None = None,
    max_pixels: int | None = None,
    start: float = 0.0,
    end: float | None = None,
    progress: Progress | None = None,
) -> Clip:
    """Read a video as a model's own video processor would sample it, where not told otherwise;
    with its sound, if the model hears."""
    video = processor.video_processor
    pixels = max_pixels or video.size["longest_edge"]
    clip = read_video(
        path,
        fps=fps if fps is not None else getattr(video, "fps", None) or 2.0,
        min_frames=getattr(video, "min_frames", 1),
        max_frames=max_frames if max_frames is not None else getattr(video, "max_frames", 768),
        multiple_of=video.temporal_patch_size,
        max_pixels=4 * pixels,  # the processor resizes with better filters than the decoder
        start=start,
        end=end,
        progress=progress,
    )
    if not hears(processor):
        return clip
    return replace(clip, wave=read_audio(path, start=start, end=end))


class Chat:
    """One conversation: videos, then images, then questions and answers, batch of one.

        chat = Chat(model, processor, videos=[read_video("clip.mp4")])
        with PureKV(PureKVConfig(budget=0.2))(model) as run:
            print(chat.ask("What happens?").text, chat.ask("In which colour?").text)

    Several chats may take turns on one model, in one thread.
    `max_pixels` bounds each frame or image (None: the processor's own limit).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        *,
        videos: Sequence[Clip] = (),
        images: Sequence[Image] = (),
        max_pixels: int | None = None,
    ) -> None:
        if max_pixels is not None and max_pixels < 1:
            raise PureKVError(f"max_pixels={max_pixels}; it must be at least 1, e.g. 200704")
        self.model = model
        self.processor = processor
        self._videos = list(videos)
        self._images = list(images)
        self._max_pixels = max_pixels
        self._messages: list[dict[str, Any]] = []
        self._ids: Tensor | None = None
        self._cache: Cache | None = None
        self._rope_deltas: Tensor | None = None

    def ask(self, question: str, *, max_new_tokens: int = 64, **generate: Any) -> Answer:
        """Generate the answer, greedily unless `generate` says otherwise.

        Raises PureKVError for a question with a placeholder token of media, or for more than one
        beam or returned sequence: what the cache then holds is not the conversation.
        """
        self._check(question, generate)
        message = _message("user", question)
        if self._ids is None:
            message["content"] = [*self._placeholders(), *message["content"]]
            inputs = self._first_prompt(message)
        else:
            inputs = self._next_prompt(message, self._ids)
        inputs = inputs.to(self.model.device)
        self._put_back_positions()
        seen = 0 if self._cache is None else self._cache.get_seq_length()
        try:
            output = self.model.generate(
                **inputs,
                return_dict_in_generate=True,
                **{
                    CACHE: self._cache,
                    "max_new_tokens": max_new_tokens,
                    "do_sample": False,
                    **generate,
                },
            )
        except BaseException:  # an interrupted turn never was
            if self._cache is not None:
                self._cache.crop(seen - self._cache.get_seq_length())
            raise
        token_ids = output.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        text = self.processor.tokenizer.decode(token_ids, skip_special_tokens=True).strip()
        self._ids, self._cache = output.sequences, cache_of(output)
        self._rope_deltas = getattr(self.model.base_model, "rope_deltas", None)
        self._messages += [message, _message("assistant", text)]
        return Answer(text, token_ids)

    def _check(self, question: str, generate: dict[str, Any]) -> None:
        for name in ("image_token", "video_token"):
            token = getattr(self.processor, name, None)
            if token and token in question:
                raise PureKVError(f"the question contains {token}, which stands for media; drop it")
        for name in ("num_beams", "num_return_sequences"):
            if (generate.get(name) or 1) > 1:
                raise PureKVError(f"{name}={generate[name]} in a chat; use model.generate for that")

    def _placeholders(self) -> list[dict[str, str]]:
        return [{"type": "video"} for _ in self._videos] + [{"type": "image"} for _ in self._images]

    def _first_prompt(self, message: dict[str, Any]) -> BatchFeature:
        """Ids, pixels and grids."""
        images, videos = self.processor.image_processor, self.processor.video_processor
        return model_inputs(
            self.processor,
            [self._render([message])],
            self._videos,
            self._images,
            images_kwargs=self._size(images) if self._images else None,
            videos_kwargs=self._size(videos) if self._videos else None,
        )

    def _next_prompt(self, message: dict[str, Any], past: Tensor) -> BatchFeature:
        """All ids of the conversation, `past` [1, S] and behind it the next question's."""
        draft = [*self._messages[:-1], _message("assistant", _ANSWER), message]
        rest = self._render(draft).rpartition(_ANSWER)[2]
        # The model has usually closed its turn itself.
        rest = rest.removeprefix(self.processor.tokenizer.decode(past[0, -1:]))
        new = self.processor.tokenizer(rest, add_special_tokens=False, return_tensors="pt")
        ids = torch.cat([past, new["input_ids"].to(past.device)], dim=1)
        return BatchFeature({"input_ids": ids, "attention_mask": torch.ones_like(ids)})

    def _size(self, processor: Any) -> dict[str, Any]:
        if self._max_pixels is None:
            return {}
        smallest = min(processor.size["shortest_edge"], self._max_pixels)
        return {"size": {"shortest_edge": smallest, "longest_edge": self._max_pixels}}

    def _render(self, messages: list[dict[str, Any]]) -> str:
        return self.processor.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )

    def _put_back_positions(self) -> None:
        """M-RoPE's offset of the text lives on the model, where another chat may have moved it."""
        if self._rope_deltas is not None:
            self.model.base_model.rope_deltas = self._rope_deltas


def _message(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "text": text}]}
