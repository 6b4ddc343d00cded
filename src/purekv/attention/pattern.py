"""Who attends to whom in a spatial-temporal sparse prefill. The one definition: `Pattern.visible`.

Some positions are *open*: everything behind them may look at them. Open are all text and the
anchors of every image and video, its first frames. They are few. Of an earlier video a later one
sees its anchors and no more: the cost stays linear in what came before, and where both are
compared is the text behind them, which sees everything.

What is not open belongs to a `Clip`: frames of h x w positions, cut into tiles. Of images, which
have one frame, large ones are cut into bands of whole rows, and bands take the place of frames:
the first is the anchor, the others see their own band and, above it, what stands in their tile.
Small images are all anchor: dense inside, and open.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from purekv.errors import PureKVError
from purekv.layout import Layout, VisualSpan, media_of

IMAGE_BAND = 1024
"""Most tokens in a band of an image. One of less than two bands stays whole."""

Interval = tuple[int, int]
"""Positions from the first up to, not including, the second."""


@dataclass(frozen=True)
class Clip:
    """Frames of one video behind its anchors, or bands of one image."""

    starts: tuple[int, ...]
    """Position of the first token of each frame; there may be text in between."""
    height: int
    width: int
    tile: int
    """Side of a tile in positions. Tiles at the right and lower edges may be smaller."""

    @property
    def frame_tokens(self) -> int:
        return self.height * self.width

    @cached_property
    def runs(self) -> list[Interval]:
        """Numbers of the frames that follow each other without text. Asked in every layer."""
        if not self.starts:
            return []
        gaps = [
            number
            for number, (one, other) in enumerate(pairwise(self.starts), 1)
            if other != one + self.frame_tokens
        ]
        return list(pairwise([0, *gaps, len(self.starts)]))

    def positions(self, frames: Interval) -> Interval:
        """Of consecutive frames."""
        return self.starts[frames[0]], self.starts[frames[1] - 1] + self.frame_tokens

    def tiles(self) -> Tensor:
        """int64 [height * width]: number of each position's tile."""
        across = -(-self.width // self.tile)
        rows, columns = (torch.arange(n) // self.tile for n in (self.height, self.width))
        return (rows[:, None] * across + columns).flatten()


@dataclass(frozen=True)
class Context:
    """The open positions before a clip, and those among its frames."""

    positions: list[Interval]
    seen: tuple[int, ...]
    """How many of them each frame sees: the first ones, more where there was text in between."""


@dataclass(frozen=True)
class Pattern:
    """Of one row of a batch. Without clips it is plain causal attention."""

    tokens: Interval
    """All but padding."""
    anchors: tuple[Interval, ...] = ()
    """Visual tokens that are open."""
    clips: tuple[Clip, ...] = ()

    def visible(self, queries: Tensor, seq_len: int) -> Tensor:
        """What the queries at these positions see.

        A query sees itself and, of what is before it: if it is text, everything; if not, all that
        is open, its own frame, and its own tile in earlier frames of its clip.

        Args:
            queries: int64 [n].
            seq_len: of the row, padding included.

        Returns:
            bool [n, seq_len]; nothing in rows of padding.
        """
        is_token = torch.zeros(seq_len, dtype=torch.bool)
        is_token[slice(*self.tokens)] = True
        is_text, is_open = is_token.clone(), is_token.clone()
        for anchor in self.anchors:
            is_text[slice(*anchor)] = False
        frame, tile = torch.full((2, seq_len), -1)  # numbers, unique over all clips
        frames = tiles = 0
        for clip in self.clips:
            number = clip.tiles()
            for start in clip.starts:
                part = slice(start, start + clip.frame_tokens)
                is_text[part] = is_open[part] = False
                frame[part], tile[part] = frames, tiles + number
                frames += 1
            tiles += int(number[-1]) + 1
        # -1 equals -1 only between open positions, and those are seen anyway.
        seen = is_open | is_text[queries, None]
        seen = seen | (frame[queries, None] == frame) | (tile[queries, None] == tile)
        before = torch.arange(seq_len) <= queries[:, None]
        return seen & before & is_token & is_token[queries, None]

    def pairs(self) -> int:
        """Queries and keys that see each other: each is 4 * head_dim operations a head."""
        count = 0
        for (start, stop), keys in self.open_runs:
            count += _triangle(stop - start) + (stop - start) * _length(keys)
        for clip, context in zip(self.clips, self.contexts, strict=True):
            frames, size = len(clip.starts), clip.frame_tokens
            count += frames * _triangle(size) + size * sum(context.seen)
            count += int(clip.tiles().bincount().square().sum()) * _triangle(frames - 1)
        return count

    @cached_property
    def open_runs(self) -> list[tuple[Interval, list[Interval]]]:
        """Runs of open positions, and what each sees of the positions before it: all of them."""
        first = min((clip.starts[0] for clip in self.clips), default=self.tokens[1])
        runs: list[tuple[Interval, list[Interval]]] = []
        if first > self.tokens[0]:
            runs.append(((self.tokens[0], first), []))
        behind = first
        for (start, stop), is_anchor in [*self._visual, ((self.tokens[1],) * 2, False)]:
            if start < first:
                continue
            if start > behind:  # text
                runs.append(((behind, start), [(self.tokens[0], behind)]))
            if is_anchor:
                runs.append(((start, stop), self._open_before(start)))
            behind = stop
        return [(run, [part for part in keys if part[1] > part[0]]) for run, keys in runs]

    @cached_property
    def contexts(self) -> list[Context]:
        """Of each clip."""
        return [
            Context(
                self._open_before(clip.starts[-1]),
                tuple(_length(self._open_before(start)) for start in clip.starts),
            )
            for clip in self.clips
        ]

    def _open_before(self, position: int) -> list[Interval]:
        """The open positions before the first of a frame or of a run of anchors."""
        found: list[Interval] = []
        behind = self.tokens[0]
        for (start, stop), is_anchor in self._visual:
            if start < position and not is_anchor:
                found.append((behind, start))
                behind = stop
        found.append((behind, position))  # empty within a run
        return [part for part in found if part[1] > part[0]]

    @cached_property
    def _visual(self) -> list[tuple[Interval, bool]]:
        """Runs of visual tokens in order, each with whether it is an anchor."""
        runs = [(anchor, True) for anchor in self.anchors]
        runs += [(clip.positions(run), False) for clip in self.clips for run in clip.runs]
        return sorted(runs)


def row_patterns(
    layout: Layout, tile: int, anchor_frames: int, min_tokens: int, image_band: int = IMAGE_BAND
) -> tuple[Pattern, ...]:
    """The pattern of each row of a batch.

    Args:
        layout: of the prompt, on the CPU.
        tile: side of a tile in positions.
        anchor_frames: first frames of each video that are open.
        min_tokens: rows with fewer visual tokens stay dense.
        image_band: see `IMAGE_BAND`.

    Raises:
        PureKVError: a row has padding between its tokens.
    """
    patterns = []
    for row, spans in enumerate(layout.spans):
        where = layout.is_token[row].nonzero().flatten()
        tokens = (int(where[0]), int(where[-1]) + 1) if len(where) else (0, 0)
        if tokens[1] - tokens[0] != len(where):
            raise PureKVError(
                f'row {row} has padding between its tokens, which prefill="spatiotemporal" cannot '
                'skip; pad on one side, as the tokenizer does, or use prefill="dense"'
            )
        pattern = Pattern(tokens)
        if layout.visual_tokens[row] >= min_tokens:
            anchors: list[Interval] = []
            clips: list[Clip] = []
            for medium in media_of(spans):
                opens, clip = _split(medium.spans, tile, anchor_frames, image_band)
                anchors += opens
                clips += [clip] if clip.starts else []
            if clips:
                pattern = Pattern(tokens, tuple(anchors), tuple(clips))
        patterns.append(pattern)
    return tuple(patterns)


def _split(
    medium: Sequence[VisualSpan], tile: int, anchor_frames: int, image_band: int
) -> tuple[list[Interval], Clip]:
    """Anchors and clip of one image or video."""
    time, height, width = medium[0].grid
    start = medium[0].start
    if medium[0].modality != "video":  # audio is a picture of time and frequency
        rows, height = time * height, max(1, image_band // width)
        bands = max(0, rows // height - 1)
        first = start + (rows - bands * height) * width  # the anchor has the rows left over
        starts = tuple(first + number * height * width for number in range(bands))
        return [(start, first)], Clip(starts, height, width, tile)
    size = height * width
    frames = [s.start + number * size for s in medium for number in range(s.grid[0])]
    anchors = Clip(tuple(frames[:anchor_frames]), height, width, tile)
    clip = Clip(tuple(frames[anchor_frames:]), height, width, tile)
    return [anchors.positions(run) for run in anchors.runs], clip


def _length(intervals: Sequence[Interval]) -> int:
    return sum(stop - start for start, stop in intervals)


def _triangle(n: int) -> int:
    return n * (n + 1) // 2
