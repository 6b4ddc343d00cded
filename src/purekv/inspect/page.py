"""An inspection as one HTML page that needs nothing else."""

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from purekv.inspect.prompt import Inspection
from purekv.media import Clip

MAX_MOMENTS = 48
MAX_CELLS = 4_000_000  # layers x KV heads x visual tokens shown; a byte each before base64


@dataclass(frozen=True)
class Moment:
    """What one `h * w` block of visual tokens stands for: a moment of a video, or an image."""

    name: str
    picture: Image.Image
    grid: tuple[int, int]
    start: int
    """Number of its first token among the visual ones."""


def moments(
    inspection: Inspection,
    videos: Sequence[tuple[str, Clip]],
    images: Sequence[tuple[str, Image.Image]],
) -> list[Moment]:
    """All moments of the prompt, in order: of named videos, then of images.

    Of the frames that the model merges into one moment, the first is the picture.
    """
    found, start = [], 0
    media: list[tuple[str, Clip | Image.Image]] = [*videos, *images]
    for (name, medium), span in zip(media, inspection.recording.spans, strict=True):
        t, h, w = span.grid
        for moment in range(t):
            if isinstance(medium, Clip):
                frame = moment * len(medium.frames) // t
                picture = Image.fromarray(medium.frames[frame])
                title = f"{frame / medium.fps:.1f} s"
                if len(media) > 1:
                    title = f"{name}, {title}"
            else:
                picture, title = medium.convert("RGB"), name
            found.append(Moment(title, picture, (h, w), start))
            start += h * w
    return found


def make_page(inspection: Inspection, all_moments: Sequence[Moment], subject: str) -> str:
    """HTML. `subject` says what was asked of which model."""
    some = _some(inspection, all_moments)
    data = _figures(inspection) | {
        "subject": subject,
        "shown": _shown(all_moments, some),
        "cells": _cells(inspection, some),
        "moments": [
            {"name": m.name, "grid": m.grid, "image": _jpeg(m.picture, len(some))} for m in some
        ],
    }
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    template = Path(__file__).with_name("template.html").read_text(encoding="utf-8")
    return template.replace("__DATA__", text)


def figures(inspection: Inspection) -> dict[str, Any]:
    """The numbers behind the page, plain JSON types."""
    report, config = inspection.report, inspection.config
    return {
        "question": inspection.question,
        "answers": {"full": inspection.full, "compressed": inspection.compressed},
        "visual_tokens": report.visual_tokens[0],
        "kept_visual_tokens": report.kept_visual_tokens[0],
        "kept": inspection.kept.sum(-1).tolist(),
        "kept_by_any": inspection.kept.any(1).sum(-1).tolist(),
        "kept_by_all": inspection.kept.all(1).sum(-1).tolist(),
        "kv_bytes_full": report.kv_bytes_full,
        "kv_bytes_kept": report.kv_bytes_kept,
        "source_layers": report.source_layers,
        "serving": inspection.serving,
        "spearman": _rounded(inspection.spearman),
        "recall": [
            [value if source <= target else None for target, value in enumerate(line)]
            for source, line in enumerate(_rounded(inspection.recall))
        ],
        "recall_top": inspection.recall_top,
        "config": config.to_dict(),
    }


def _figures(inspection: Inspection) -> dict[str, Any]:
    """`figures`, and what the page's controls need."""
    recording = inspection.recording
    num_layers, num_heads, _ = inspection.kept.shape
    group = recording.window.shape[1] // num_heads
    window = inspection.config.window
    return figures(inspection) | {
        "layers": num_layers,
        "heads": num_heads,
        "query_heads": [
            f"query heads {g * group} to {(g + 1) * group - 1}" if group > 1 else f"query head {g}"
            for g in range(num_heads)
        ],
        "window": "all text behind the last visual token"
        if window == "question"
        else f"the last {window} text tokens",
    }


def _some(inspection: Inspection, all_moments: Sequence[Moment]) -> list[Moment]:
    """As many as the page holds, evenly spaced."""
    num_layers, num_heads, _ = inspection.kept.shape
    largest = max(h * w for h, w in (moment.grid for moment in all_moments))
    most = min(MAX_MOMENTS, max(1, MAX_CELLS // (num_layers * num_heads * largest)))
    count = min(most, len(all_moments))
    return [all_moments[round(i * len(all_moments) / count)] for i in range(count)]


def _shown(all_moments: Sequence[Moment], some: Sequence[Moment]) -> str:
    if len(some) == len(all_moments):
        return "Everything is shown; of video frames that the model sees as one, the first."
    return (
        f"{len(some)} of {len(all_moments)} moments are shown, evenly spaced, to keep the page "
        "small; the counts above and the matrices below are those of all."
    )


def _cells(inspection: Inspection, some: Sequence[Moment]) -> str:
    """Base64 of a byte for each layer, KV head and token shown: bit 7 says that it stayed, the rest
    is the score's rank among all visual tokens of that head, 0 to 127."""
    score = inspection.score
    rank = score.argsort(-1).argsort(-1) * 127 // max(1, score.shape[-1] - 1)
    cells = rank.to(torch.uint8) + 128 * inspection.kept.to(torch.uint8)
    shown = torch.cat([cells[..., m.start : m.start + m.grid[0] * m.grid[1]] for m in some], -1)
    return base64.b64encode(np.ascontiguousarray(shown.numpy()).tobytes()).decode()


def _jpeg(picture: Image.Image, count: int) -> str:
    side = 1280 if count == 1 else 640 if count <= 8 else 320
    picture = picture.copy()
    picture.thumbnail((side, side))
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def _rounded(matrix: Tensor) -> list[list[float]]:
    return [[round(value, 3) for value in line] for line in matrix.tolist()]


def write_page(path: Path, page: str) -> None:
    """In one piece."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(page, encoding="utf-8")
    temporary.replace(path)
