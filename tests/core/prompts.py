"""Prompts for the tiny model, made by its own processor."""

from typing import Any

import numpy as np
import torch
from transformers.video_utils import VideoMetadata

from tests.tiny import tiny_processor

PROCESSOR = tiny_processor()


def pixels(seed: int, frames: int, height: int, width: int) -> np.ndarray:
    """uint8 [frames, height, width, 3]."""
    shape = (frames, height, width, 3)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


# What one row of a batch shows: ("video", frames, height, width) or ("image", height, width).
MODALITIES: dict[str, list[tuple[Any, ...]]] = {
    "image": [("image", 48, 32)],
    "images": [("image", 48, 32), ("image", 32, 32)],
    "video": [("video", 6, 32, 48)],
    "videos": [("video", 4, 32, 32), ("video", 6, 32, 48)],
    "mixed": [("image", 48, 48), ("video", 6, 32, 32)],
}
QUESTIONS = ["what is it?", "how many frames does this one have, and why so many?", "and?"]


Media = tuple[Any, ...]
Row = tuple[int, list[Media], str]
"""Number of a row, which seeds its pixels; what it shows; its question."""


def prompt(
    modality: str = "video", batch: int = 1, seed: int = 0, rows: list[int] | None = None
) -> dict[str, torch.Tensor]:
    """Model inputs of a left-padded batch whose rows differ in text and in visual size.

    `rows` takes only those rows of the batch.
    """
    made: list[Row] = []
    for row in rows if rows is not None else range(batch):
        wider = 16 * (row % 2)
        media = [
            (kind, *size[:-2], *(length + wider for length in size[-2:]))
            for kind, *size in MODALITIES[modality]
        ]
        made.append((row, media, QUESTIONS[row]))
    return prompt_of(made, seed)


def prompt_of(
    rows: list[Row], seed: int = 0, padding_side: str = "left"
) -> dict[str, torch.Tensor]:
    """Model inputs of a padded batch of these rows."""
    messages, images, videos, metadata = [], [], [], []
    for row, media, question in rows:
        content: list[dict[str, str]] = []
        for place, (kind, *size) in enumerate(media):
            frames = pixels(
                100 * seed + 10 * row + place, size[0] if kind == "video" else 1, *size[-2:]
            )
            if place:
                content.append({"type": "text", "text": "then " * place})
            content.append({"type": kind})
            if kind == "video":
                indices = list(range(len(frames)))
                videos.append(torch.from_numpy(frames).permute(0, 3, 1, 2))
                metadata.append(VideoMetadata(len(frames), fps=2.0, frames_indices=indices))
            else:
                images.append(frames[0])
        content.append({"type": "text", "text": question})
        messages.append([{"role": "user", "content": content}])
    text = PROCESSOR.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    arguments: dict[str, Any] = {"images": images} if images else {}
    if videos:
        arguments |= {
            "videos": videos, "video_metadata": metadata, "do_sample_frames": False
        }  # fmt: skip
    return dict(
        PROCESSOR(
            text=text, padding=True, padding_side=padding_side, return_tensors="pt", **arguments
        )
    )
