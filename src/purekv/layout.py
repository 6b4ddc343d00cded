"""Where the visual tokens of a prompt are. Built once a prefill, on the CPU."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class VisualSpan:
    """One image or video in a prompt: `t * h * w` consecutive tokens, frame after frame."""

    start: int
    """Position of the first token in its (padded) row."""
    grid: tuple[int, int, int]
    """Tokens in time, height and width, as the language model sees them (after merging)."""
    modality: str
    """What it shows: "image", "video" or "audio"; "prompt" where text may be forgotten too."""
    continues: bool = False
    """Whether these are further frames of the video of the span before, behind some text (a time
    stamp)."""

    @property
    def length(self) -> int:
        t, h, w = self.grid
        return t * h * w

    @property
    def stop(self) -> int:
        """Position behind its last token."""
        return self.start + self.length


@dataclass(frozen=True)
class Medium:
    """One image, video or sound: its spans, between which there may be text."""

    spans: tuple[VisualSpan, ...]

    @property
    def grid(self) -> tuple[int, int, int]:
        """Of all its spans."""
        _, height, width = self.spans[0].grid
        return sum(span.grid[0] for span in self.spans), height, width

    def positions(self, device: torch.device) -> slice | Tensor:
        """An index of its tokens, in order."""
        if len(self.spans) == 1:
            return slice(self.spans[0].start, self.spans[0].stop)
        parts = [torch.arange(span.start, span.stop) for span in self.spans]
        return torch.cat(parts).to(device)


def media_of(spans: Sequence[VisualSpan]) -> list[Medium]:
    """The media of a row, in the order in which they begin."""
    media: list[list[VisualSpan]] = []
    latest: dict[str, list[VisualSpan]] = {}  # sound may come between the frames of a video
    for span in spans:
        if span.continues and span.modality in latest:
            latest[span.modality].append(span)
        else:
            media.append([span])
            latest[span.modality] = media[-1]
    return [Medium(tuple(medium)) for medium in media]


@dataclass(frozen=True)
class Layout:
    """What each position of a padded batch is. B rows of S positions."""

    is_token: Tensor
    """bool [B, S]; False at padding."""
    is_visual: Tensor
    """bool [B, S]; True at image and video tokens."""
    spans: tuple[tuple[VisualSpan, ...], ...]
    """The visual spans of each row, in order."""

    @classmethod
    def build(cls, is_token: Tensor, spans: Sequence[Sequence[VisualSpan]]) -> "Layout":
        """`is_token`: bool [B, S] on the CPU; `spans`: those of each row."""
        is_visual = np.zeros(is_token.shape, dtype=bool)
        for row, row_spans in enumerate(spans):
            for span in row_spans:
                is_visual[row, span.start : span.stop] = True
        return cls(is_token, torch.from_numpy(is_visual), tuple(map(tuple, spans)))

    def to(self, device: torch.device) -> "Layout":
        return Layout(self.is_token.to(device), self.is_visual.to(device), self.spans)

    @property
    def is_text(self) -> Tensor:
        """bool [B, S]; tokens that are neither padding nor visual."""
        return self.is_token & ~self.is_visual

    @property
    def is_tail(self) -> Tensor:
        """bool [B, S]; text behind the row's last visual token; nothing in rows without one."""
        behind = torch.zeros_like(self.is_token)
        for row, row_spans in enumerate(self.spans):
            if row_spans:
                behind[row, row_spans[-1].stop :] = True
        return behind & self.is_token

    @property
    def newest_tail(self) -> Tensor:
        """bool [B, n]; `is_tail` from the first position at which any row has it."""
        is_tail = self.is_tail
        return is_tail[:, int(is_tail.any(0).nonzero()[0]) :]

    @cached_property
    def trailing_text(self) -> int:
        """Newest positions that are behind the last visual token of every row."""
        seq_len = self.is_token.shape[1]
        ends = [row[-1].stop for row in self.spans if row]
        return seq_len - max(ends, default=0)

    @cached_property
    def visual_tokens(self) -> tuple[int, ...]:
        """Visual tokens of each row."""
        return tuple(sum(span.length for span in row) for row in self.spans)

    @cached_property
    def text_tokens(self) -> tuple[int, ...]:
        """Text tokens of each row, padding not counted."""
        tokens = self.is_token.sum(-1).tolist()
        return tuple(n - visual for n, visual in zip(tokens, self.visual_tokens, strict=True))

    @cached_property
    def has_padding(self) -> bool:
        return 0 in self.is_token.numpy().tobytes()
