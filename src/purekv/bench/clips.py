"""A real video as a prompt of about the visual tokens that one asks for."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import ProcessorMixin

from purekv import families
from purekv.bench.phases import Measured
from purekv.bench.stopwatch import Stopwatch
from purekv.errors import PureKVError
from purekv.media import Clip
from purekv.session import read_clip


def clip_inputs(
    processor: ProcessorMixin, config: Any, clip: Clip, tokens: int | None, question: str
) -> dict[str, Tensor]:
    """Arguments of the model's forward, on the CPU: the clip, then the question.

    Args:
        config: the model's.
        tokens: visual tokens to aim at by cutting the clip, or by playing it again from its start;
            None for those of the clip as it is. Whole frames only, so that the processor decides.

    Raises:
        PureKVError: fewer tokens than one frame has.
    """
    inputs = _process(processor, clip, question)
    if tokens is None:
        return inputs
    group = processor.video_processor.temporal_patch_size
    groups = -(-len(clip.frames) // group)
    per_group = visual_tokens(config, inputs) / groups
    if tokens < per_group / 2:
        raise PureKVError(
            f"tokens={tokens} with {per_group:.0f} visual tokens a frame; ask for at least that "
            "many"
        )
    count = group * max(1, round(tokens / per_group))
    again = np.arange(count) % len(clip.frames)
    return _process(processor, Clip(clip.frames[again], clip.fps), question)


def decode_video(
    processor: ProcessorMixin, path: Path, repeats: int
) -> tuple[Clip, list[Measured]]:
    """Read a file as the model's own processor would sample it, so many times after the first."""
    clip, measured = read_clip(processor, path), []
    for _ in range(repeats):
        with Stopwatch(torch.device("cpu")) as watch:
            clip = read_clip(processor, path)
        measured.append(Measured(watch.ms, watch.peak_bytes))
    return clip, measured


def visual_tokens(config: Any, inputs: dict[str, Tensor]) -> int:
    """Those of the first row."""
    return families.for_config(config).layout(config, inputs).visual_tokens[0]


def _process(processor: ProcessorMixin, clip: Clip, question: str) -> dict[str, Tensor]:
    content = [{"type": "video"}, {"type": "text", "text": question}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    inputs = processor(
        text=[text],
        videos=[clip.frames],
        videos_kwargs={"video_metadata": [clip.metadata], "do_sample_frames": False},
        return_tensors="pt",
    )
    return dict(inputs)
