"""Asking a batch of samples all their turns, with the gold answers as history.

A later turn is asked after the *gold* earlier answers, so that every method sees the same chat,
and on the cache that the first prompt left: compressed, if PureKV is attached to the model.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin
from transformers.cache_utils import Cache

from purekv import families
from purekv.cache import entry_bytes
from purekv.errors import PureKVError
from purekv.evals.positions import TextPositions, first_positions
from purekv.evals.samples import Sample
from purekv.evals.shared import Stack
from purekv.inputs import model_inputs
from purekv.media import Clip, read_image
from purekv.session import read_clip
from purekv.upstream import CACHE, cache_of

SPARE_TOKENS = 2
ROWS_OF_LOGITS = 64
"""So many answers' logits are made at once."""
FREE_TOKENS = 64
"""Room of an answer in free text, whose length is not the gold one's."""


@dataclass(frozen=True)
class Media:
    """What one sample shows, in the order in which the prompt does: videos first."""

    videos: tuple[Clip, ...] = ()
    images: tuple[Image, ...] = ()

    @property
    def pixels(self) -> int:
        """How large the prompt will be: an image costs as much as two frames of its size."""
        frames = sum(video.frames[..., 0].size for video in self.videos)
        return frames + sum(2 * image.height * image.width for image in self.images)

    @property
    def sound(self) -> str | None:
        """ "heard" where the model gets any, "unheard" where it hears nothing of what is there."""
        if any(video.wave is not None for video in self.videos):
            return "heard"
        return "unheard" if any(video.has_sound for video in self.videos) else None


Read = Callable[[Sample], Media]


@dataclass(frozen=True)
class Batch:
    """Samples ready to be asked, by as many methods as one likes."""

    prompts: list[list[str]]
    """Prompt text of each turn and sample, the gold history included."""
    golds: list[list[str]]
    """Gold answer of each turn and sample."""
    inputs: dict[str, Any]
    """Of the first turn, tensors on the model's device; a flag where sound is woven into videos."""
    max_new_tokens: list[list[int]]
    """Of each turn and sample: room for the gold answer and a few tokens more, or for free text.
    What is longer than that is wrong however it goes on, and cut there: it must not matter what
    else is in the batch."""


@dataclass
class Row:
    """What one sample, under one method, answered."""

    texts: list[str]
    """Greedy answer to each turn, as far as the batch leaves it room."""
    ended: list[bool]
    """Whether the model had said all of it by then."""
    forced: list[Tensor]
    """For each turn, log-probabilities of the token behind each part of the gold answer, from none
    of it to all: float32 [gold tokens + 1, vocabulary]. Empty unless asked for."""
    kv_bytes: int = 0
    """Of all cache tensors once the first prompt has run, its last token included: the batch's,
    over its rows."""


def read_media(processor: ProcessorMixin, sample: Sample) -> Media:
    """A sample's files, decoded as the model's own processor would sample them."""
    return Media(
        tuple(read_clip(processor, path) for path in sample.videos),
        tuple(read_image(path) for path in sample.images),
    )


def prepare_samples(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    samples: Sequence[Sample],
    media: Sequence[Media] | None = None,
) -> Batch:
    """Tokens and pixels of a left-padded batch.

    Args:
        samples: all with the same number of turns.
        media: theirs (default: read from their files).
    """
    turns = len(samples[0].turns)
    if any(len(sample.turns) != turns for sample in samples):
        raise PureKVError("the samples of a batch must have the same number of turns")
    if media is None:
        media = [read_media(processor, sample) for sample in samples]
    messages = [_messages(*pair) for pair in zip(samples, media, strict=True)]
    prompts = [
        [
            _render(processor, chat[: 2 * (len(sample.history) + turn) + 1])
            for sample, chat in zip(samples, messages, strict=True)
        ]
        for turn in range(turns)
    ]
    inputs = _first_inputs(processor, prompts[0], media, model.device)
    golds = [[sample.turns[turn].answer for sample in samples] for turn in range(turns)]
    tokens = [processor.tokenizer(texts, add_special_tokens=False)["input_ids"] for texts in golds]
    room = [
        [
            FREE_TOKENS if sample.turns[turn].references else len(ids) + SPARE_TOKENS
            for sample, ids in zip(samples, row, strict=True)
        ]
        for turn, row in enumerate(tokens)
    ]
    return Batch(prompts, golds, dict(inputs.to(model.device)), room)


def whole_chats(processor: ProcessorMixin, batch: Batch) -> dict[str, Any]:
    """Inputs of all turns at once, the gold answer to the last one included; pixels as in
    `batch.inputs`, whose ids come first."""
    texts = [
        last[len(first) :] + gold
        for first, last, gold in zip(
            batch.prompts[0], batch.prompts[-1], batch.golds[-1], strict=True
        )
    ]
    shape = batch.inputs["input_ids"].shape
    longer = _next_inputs(processor, batch.inputs, texts)
    more = longer["input_ids"].shape[1] - shape[1]
    rest = {
        # Whatever says of each token what it is: what follows is text.
        name: torch.nn.functional.pad(value, (0, more)) if _is_of(shape, value) else value
        for name, value in batch.inputs.items()
    }
    return rest | longer


def _is_of(shape: torch.Size, value: Any) -> bool:
    return isinstance(value, Tensor) and value.shape == shape


@torch.no_grad()
def answer_samples(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    batch: Batch,
    stack: Stack | None = None,
    force: bool = False,
    decode: bool = True,
) -> list[Row]:
    """Greedy answers to every turn: of each sample, or of each row of a stack of caches.

    Args:
        stack: the batch's first prompt, prefilled by a `SharedPrefill`; its cache grows.
        force: also read the gold answers, for `Row.forced`.
        decode: if not, answers come from that reading: greedy decoding says the gold answer just
            when each of its tokens, and then the end, is the most likely one. Of another answer
            that gives the first token that differs, and what was said before. One forward for all
            tokens of an answer, where decoding takes one for each.
    """
    force = force or not decode
    inputs: dict[str, Any] = dict(batch.inputs)
    copies, text = 1, None
    if stack is not None:
        copies, text = len(stack.members), stack.text
        inputs = {name: inputs[name].repeat(copies, 1) for name in ("input_ids", "attention_mask")}
        inputs[CACHE] = stack.cache
        text.answer(model)
    ends = _end_tokens(model, processor)
    rows = [Row([], [], []) for _ in range(inputs["input_ids"].shape[0])]
    for turn, prompts in enumerate(batch.prompts):
        golds = batch.golds[turn] * copies
        gold_ids = processor.tokenizer(golds, add_special_tokens=False)["input_ids"]
        if CACHE in inputs and not decode and any(gold_ids):
            # What is new of the prompt, and the gold answer, in one forward.
            cache, said = inputs[CACHE], []
            forced = _read(model, processor, inputs, golds, prompt_too=True)
            kv_bytes = entry_bytes(cache)
        else:
            room = batch.max_new_tokens[turn] * copies if decode else [1] * len(rows)
            found = _generate(model, inputs, max(room), force)
            cache, kv_bytes = found.cache, found.kv_bytes
            said = [ids[:most] for ids, most in zip(found.said, room, strict=True)]
            text = text or TextPositions.of_prompt(model, found.position_ids)
            if found.first is not None:
                forced = list(found.first)
                if any(gold_ids):
                    if turn == 0:
                        text.answer(model)
                    parts = _read(model, processor, {**inputs, CACHE: cache}, golds)
                    forced = [torch.cat(pair) for pair in zip(forced, parts, strict=True)]
        if turn == 0:
            for row in rows:
                row.kv_bytes = kv_bytes // len(rows)
        inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")} | {CACHE: cache}
        if force:
            for row, log_probabilities in zip(rows, forced, strict=True):
                row.forced.append(log_probabilities)
            if not decode:
                likely = torch.cat([row.forced[turn].argmax(-1) for row in rows]).cpu()  # at once
                parts = likely.split([len(row.forced[turn]) for row in rows])
                pairs = zip(parts, gold_ids, strict=True)
                said = [_until_it_differs(part.tolist(), gold) for part, gold in pairs]
        for row, ids in zip(rows, said, strict=True):
            words = list(takewhile(lambda token: token not in ends, ids))
            row.texts.append(processor.decode(words, skip_special_tokens=True).strip())
            row.ended.append(len(words) < len(ids))
        if turn + 1 < len(batch.prompts):
            assert text is not None
            text.go_on(model)
            new = [
                after[len(before) :]
                for before, after in zip(prompts, batch.prompts[turn + 1], strict=True)
            ]
            inputs = {CACHE: cache} | _next_inputs(processor, inputs, new * copies)
    return rows


def _until_it_differs(likely: list[int], gold: list[int]) -> list[int]:
    """Tokens of a greedy answer up to the first that is not the gold answer's, or the one behind
    it. `likely` are the most likely ones behind each part of the gold answer."""
    same = takewhile(lambda pair: pair[0] == pair[1], zip(likely, gold, strict=False))
    return likely[: len(list(same)) + 1]


def _read(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    inputs: dict[str, Any],
    texts: list[str],
    prompt_too: bool = False,
) -> list[Tensor]:
    """Log-probabilities behind each token of a text that follows the prompt, float32 [n, V] a row;
    with `prompt_too`, of whose prompt the cache lacks the end, behind the prompt's last token as
    well, [1 + n, V].

    `generate` makes the forward, since it knows every family's positions; it wants something new,
    so one text at least must have a token. The cache then holds the prompt.
    """
    cache = inputs[CACHE]
    seen, prompt = cache.get_seq_length(), inputs["input_ids"].shape[1]
    further = _next_inputs(processor, inputs, texts)
    lengths = further["attention_mask"][:, prompt:].sum(1).tolist()
    hidden: list[Tensor] = []
    language = families.for_config(model.config).language_model(model)
    hook = language.register_forward_hook(
        lambda module, args, output: hidden.append(output.last_hidden_state)
    )
    try:
        model.generate(**further, **{CACHE: cache}, max_new_tokens=1, do_sample=False)
    finally:
        hook.remove()
        _rewind(cache, prompt)
    head = model.get_output_embeddings()
    found: list[Tensor] = []
    for start in range(0, len(lengths), ROWS_OF_LOGITS):
        some = slice(start, start + ROWS_OF_LOGITS)
        wanted = []
        for row, n in zip(hidden[0][some], lengths[some], strict=True):
            wanted += [row[prompt - seen - 1, None]] if prompt_too else []
            wanted.append(row[len(row) - n :])
        parts = [prompt_too + n for n in lengths[some]]
        found += head(torch.cat(wanted)).float().log_softmax(-1).split(parts)
    return found


@dataclass(frozen=True)
class _Generated:
    said: list[list[int]]
    """New tokens of each row."""
    first: Tensor | None
    """Log-probabilities of the first one, float32 [B, 1, V]; None if nobody asked."""
    cache: Cache
    """Holds the prompt."""
    kv_bytes: int
    """Of all its rows, once the prompt has run."""
    position_ids: Tensor | None
    """Of the prompt."""


def _generate(
    model: PreTrainedModel, inputs: dict[str, Any], most: int, with_first: bool
) -> _Generated:
    """Greedy decoding, which the cache then forgets."""
    sizes: list[int] = []

    def measure(module: torch.nn.Module, args: Any, output: Any) -> None:
        if not sizes:
            sizes.append(entry_bytes(cache_of(output)))

    hook = model.register_forward_hook(measure)
    try:
        with first_positions(model) as positions:
            output = model.generate(
                **inputs,
                max_new_tokens=most,
                do_sample=False,
                return_dict_in_generate=True,
                output_logits=with_first,
            )
    finally:
        hook.remove()
    prompt = inputs["input_ids"].shape[1]
    cache = cache_of(output)
    _rewind(cache, prompt)
    first = output.logits[0].float().log_softmax(-1)[:, None] if with_first else None
    said = output.sequences[:, prompt:].tolist()
    return _Generated(said, first, cache, sizes[0], positions[0])


def _end_tokens(model: PreTrainedModel, processor: ProcessorMixin) -> set[int]:
    """Those with which an answer ends."""
    ends = model.generation_config.eos_token_id
    if ends is None:
        ends = processor.tokenizer.eos_token_id
    return set(ends) if isinstance(ends, list) else {ends}


def _rewind(cache: Cache, seen: int) -> None:
    """Forget all but the first so many tokens."""
    if cache.get_seq_length() > seen:
        cache.crop(seen - cache.get_seq_length())


def _messages(sample: Sample, media: Media) -> list[dict[str, Any]]:
    """Alternating questions and gold answers; the first question carries the media."""
    messages: list[dict[str, Any]] = []
    for turn in (*sample.history, *sample.turns):
        messages.append({"role": "user", "content": [{"type": "text", "text": turn.prompt}]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": turn.answer}]})
    items = [{"type": "video"} for _ in media.videos] + [{"type": "image"} for _ in media.images]
    messages[0]["content"] = items + messages[0]["content"]
    return messages


def _render(processor: ProcessorMixin, messages: list[dict[str, Any]]) -> str:
    return processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def _first_inputs(
    processor: ProcessorMixin, prompts: list[str], media: Sequence[Media], device: torch.device
) -> Any:
    # On a GPU the processor's own arithmetic is best done there as well.
    where = {} if device.type == "cpu" else {"device": device}
    return model_inputs(
        processor,
        prompts,
        [clip for one in media for clip in one.videos],
        [image for one in media for image in one.images],
        videos_kwargs=where,
        images_kwargs=where,
    )


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
