"""Scenes to pixels, the same integers on CPU and GPU: masks are sampled from a large atlas.

Shapes below: B scenes, F frames, P pixels a side, K things, G x G visual tokens a frame, T patches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from . import scene as s

ASSETS = Path(__file__).parent / "assets"
ATLAS_SHAPE = 128
ATLAS_GLYPH = (96, 112)
GLYPHS_PER_ROW = 10
MAX_THINGS = 4
LARGEST = 56
SPARE = 64
_DARK = ("blue", "purple", "black")
_COLOURS = tuple(s.COLOURS)


@dataclass
class Packed:
    """B scenes of one geometry as int64 tensors, ready for any device."""

    frames: int
    size: int
    kinds: Tensor  # [B] index of the background's kind
    params: Tensor  # [B, 8]
    things: Tensor  # [B, K, 9] shape, colour, size, start, stop, x, y, dx, dy; absent: size 0
    plates: Tensor  # [B, 9] four glyphs, x, y, start, stop, palette

    def to(self, device: torch.device | str) -> Packed:
        tensors = (self.kinds, self.params, self.things, self.plates)
        return Packed(self.frames, self.size, *(t.to(device, non_blocking=True) for t in tensors))


def pack(scenes: Sequence[s.Scene]) -> Packed:
    things = np.zeros((len(scenes), MAX_THINGS, 9), np.int64)
    for b, scene in enumerate(scenes):
        for k, t in enumerate(scene.things):
            look = (s.SHAPES.index(t.shape), _COLOURS.index(t.colour))
            things[b, k] = (*look, t.size, t.start, t.stop, t.x, t.y, t.dx, t.dy)
    plates = [
        (*(s.GLYPHS.index(c) for c in p.code), p.x, p.y, p.start, p.stop, p.palette)
        for p in (scene.plate for scene in scenes)
    ]
    return Packed(
        scenes[0].frames,
        scenes[0].size,
        torch.tensor([s.BACKGROUNDS.index(scene.background.kind) for scene in scenes]),
        torch.tensor([scene.background.params for scene in scenes]),
        torch.from_numpy(things),
        torch.tensor(plates),
    )


def load_footage() -> np.ndarray:
    """The shipped clip as uint8 [N, H, W, 3]."""
    import av

    with av.open(str(ASSETS / "footage.mp4")) as clip:
        clip.streams.video[0].thread_type = "NONE"
        return np.stack([frame.to_ndarray(format="rgb24") for frame in clip.decode(video=0)])


class Renderer:
    """Holds the atlas and the footage on one device."""

    def __init__(
        self, device: torch.device | str = "cpu", footage: np.ndarray | None = None
    ) -> None:
        from PIL import Image

        self.device = torch.device(device)
        atlas = torch.from_numpy(np.array(Image.open(ASSETS / "atlas.png").convert("L")))
        side, (width, height) = ATLAS_SHAPE, ATLAS_GLYPH
        shapes = [atlas[:side, k * side : (k + 1) * side] for k in range(len(s.SHAPES))]
        glyphs = []
        for k in range(len(s.GLYPHS)):
            row, column = divmod(k, GLYPHS_PER_ROW)
            top, left = side + row * height, column * width
            glyphs.append(atlas[top : top + height, left : left + width])
        self.shapes = torch.stack(shapes).to(self.device)  # 0 outside, about 128 outline, 255 fill
        self.glyphs = (torch.stack(glyphs) > 127).to(self.device)
        clip = load_footage() if footage is None else footage
        self.footage = torch.from_numpy(np.ascontiguousarray(clip)).to(self.device)
        fill = np.array(list(s.COLOURS.values()), np.uint8)
        outline = np.array([(250,) * 3 if c in _DARK else (5,) * 3 for c in _COLOURS], np.uint8)
        self.colours = torch.from_numpy(np.stack([outline, fill])).to(
            self.device
        )  # [2, colours, 3]
        self.palettes = torch.tensor(s.PLATE_COLOURS, dtype=torch.uint8, device=self.device)
        wave = np.rint(127 * np.sin(np.arange(256) * (2 * np.pi / 256))).astype(np.int32)
        self.wave = torch.from_numpy(wave).to(self.device)

    @torch.no_grad()
    def __call__(self, packed: Packed) -> Tensor:
        """uint8 [B, F, 3, P, P]."""
        return self.render(packed)[0].permute(0, 1, 4, 2, 3).contiguous()

    @torch.no_grad()
    def render(self, packed: Packed) -> tuple[Tensor, Tensor]:
        """Pixels, uint8 [B, F, P, P, 3], and each token's owner, int64 [B, T, G, G].

        Owners: 0 nobody, 1..4 that thing, 5..8 that glyph of the code.
        """
        kinds = packed.kinds.tolist()
        packed = packed.to(self.device)
        batch, frames, size = len(kinds), packed.frames, packed.size
        pixels = batch * frames * size * size
        # Spare pixels at the end take what lies outside a mask.
        canvas = torch.empty(pixels + SPARE**2, 3, dtype=torch.uint8, device=self.device)
        canvas[:pixels] = self._backgrounds(packed, kinds).view(-1, 3)
        patches, grid = max(frames // 2, 1), size // s.TOKEN
        votes = torch.zeros(
            batch * patches * grid * grid * 9, dtype=torch.int32, device=self.device
        )
        for k in range(MAX_THINGS):
            index, token, shown, colour = self._thing(packed, k)
            canvas[index] = colour
            votes.index_add_(0, (token * 9 + 1 + k).flatten(), shown.flatten().int())
        index, token, boxed, glyph, colour = self._plate(packed)
        canvas[index] = colour
        votes.index_add_(0, (token * 9 + 5 + glyph).flatten(), boxed.flatten().int())
        votes = votes.view(-1, 9)
        per_patch = 2 if frames > 1 else 1
        votes[:, 1:5] *= votes[:, 1:5] >= 125 * per_patch
        votes[:, 5:] *= votes[:, 5:] >= s.GLYPH_WIDTH * s.GLYPH_HEIGHT * per_patch // 2
        owner = votes.argmax(-1) * (votes.amax(-1) > 0)
        image = canvas[:pixels].view(batch, frames, size, size, 3)
        return image, owner.view(batch, patches, grid, grid)

    def _backgrounds(self, packed: Packed, kinds: list[int]) -> Tensor:
        batch, frames, size = len(kinds), packed.frames, packed.size
        out = torch.empty(batch, frames, size, size, 3, dtype=torch.uint8, device=self.device)
        paint = dict(
            zip(s.BACKGROUNDS, (self._plain, self._noise, self._waves, self._footage), strict=True)
        )
        for number, kind in enumerate(s.BACKGROUNDS):
            rows = [b for b in range(batch) if kinds[b] == number]
            if rows:
                chosen = torch.tensor(rows, device=self.device)
                out[chosen] = paint[kind](packed.params[chosen], frames, size)
        return out

    def _axes(self, frames: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """Frame, row and column numbers, int32, shaped to broadcast over [B, F, P, P]."""

        def line(n: int) -> Tensor:
            return torch.arange(n, dtype=torch.int32, device=self.device)

        return (
            line(frames).view(1, -1, 1, 1),
            line(size).view(1, 1, -1, 1),
            line(size).view(1, 1, 1, -1),
        )

    @staticmethod
    def _base(p: Tensor) -> Tensor:
        return (50 + p[:, :3] % 140).view(-1, 1, 1, 1, 3).int()

    def _plain(self, p: Tensor, frames: int, size: int) -> Tensor:
        return self._base(p).to(torch.uint8).expand(-1, frames, size, size, 3)

    def _noise(self, p: Tensor, frames: int, size: int) -> Tensor:
        t, y, x = self._axes(frames, size)
        p = p.int()
        cell, seed, alive = (v.view(-1, 1, 1, 1) for v in (2 + p[:, 3] % 7, p[:, 4], p[:, 5] & 1))
        mix = (
            (x // cell) * 73856093 ^ (y // cell) * 19349663 ^ (t * alive) * 83492791 ^ seed * 40503
        )
        mix = (mix ^ (mix >> 15)) * 1274126177
        grain = ((mix >> 11) & 63) - 32
        return (self._base(p) + grain[..., None]).to(torch.uint8)

    def _waves(self, p: Tensor, frames: int, size: int) -> Tensor:
        t, y, x = self._axes(frames, size)
        p = p.int()
        value = self._base(p).expand(-1, frames, size, size, -1)
        for k, tint in ((3, (24, 16, 20)), (5, (12, 22, -18))):
            a, b, c = (
                v.view(-1, 1, 1, 1)
                for v in (p[:, k] % 37 - 18, p[:, k + 1] % 37 - 18, p[:, k] >> 8)
            )
            height = self.wave[(((x * a + y * b) >> 2) + t * (c % 13 - 6) + c) & 255]
            value = value + ((height[..., None] * height.new_tensor(tint)) >> 7)
        return value.to(torch.uint8)

    def _footage(self, p: Tensor, frames: int, size: int) -> Tensor:
        count, height, width, _ = self.footage.shape
        p = p.view(-1, 8, 1, 1, 1)
        t, y, x = (v.long() for v in self._axes(frames, size))
        low = min(size * 3 // 4, height)
        window = low + p[:, 0] % (height - low + 1)
        stride = 1 + p[:, 1] % 3
        moment = (p[:, 2] + t * stride) % (2 * count - 2)
        moment = torch.minimum(moment, 2 * count - 2 - moment)  # to the end and back
        room_x, room_y = width - window, height - window
        across = p[:, 3] % (room_x + 1) + t * (p[:, 4] % 5 - 2)
        down = p[:, 5] % (room_y + 1) + t * (p[:, 6] % 3 - 1)
        row = torch.clamp(down, min=0).minimum(room_y) + y * window // size
        column = torch.clamp(across, min=0).minimum(room_x) + x * window // size
        picture = self.footage.view(-1, 3)[(moment * height + row) * width + column]
        return (44 + picture.int() * 5 // 8).to(torch.uint8)

    def _thing(self, packed: Packed, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Pixel index, token index, what is shown, all [B, F, S, S], and colour [..., 3]."""
        fields = packed.things[:, k].view(-1, 9, 1, 1, 1).unbind(1)
        shape, colour, extent, start, stop, left, top, dx, dy = fields
        t, y, x, scene = self._local(packed, LARGEST, LARGEST)
        inside = (x < extent) & (y < extent) & (t >= start) & (t < stop)
        scale = 2 * extent.clamp(min=1)
        row = ((2 * y + 1) * ATLAS_SHAPE // scale).clamp(max=ATLAS_SHAPE - 1)
        column = ((2 * x + 1) * ATLAS_SHAPE // scale).clamp(max=ATLAS_SHAPE - 1)
        level = self.shapes[shape, row, column]
        shown = inside & (level > 0)
        age = t - start
        index, token = self._address(
            packed, scene, t, top + dy * age + y, left + dx * age + x, shown
        )
        return (
            index,
            token,
            shown,
            self.colours[(level > 200).long(), colour].expand(*index.shape, 3),
        )

    def _plate(self, packed: Packed) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Pixel and token index, glyph boxes, glyph number, [B, F, h, w], and colour [..., 3]."""
        fields = packed.plates.view(-1, 9, 1, 1, 1)
        left, top, start, stop, palette = fields[:, 4:].unbind(1)
        t, y, x, scene = self._local(packed, s.PLATE_HEIGHT, s.PLATE_WIDTH)
        shown = (t >= start) & (t < stop) & (y >= 0) & (x >= 0)
        side = (s.TOKEN - s.GLYPH_WIDTH) // 2
        at = x - s.PLATE_MARGIN
        number = (at // s.TOKEN).clamp(0, 3)
        column, row = at - number * s.TOKEN - side, y - s.PLATE_MARGIN
        boxed = (column >= 0) & (column < s.GLYPH_WIDTH) & (row >= 0) & (row < s.GLYPH_HEIGHT)
        width, height = ATLAS_GLYPH
        number, boxed = number.expand_as(shown), boxed.expand_as(shown)
        glyph = fields[:, :4, 0, 0, 0].gather(1, number.flatten(1)).view_as(number)
        row = ((2 * row + 1) * height // (2 * s.GLYPH_HEIGHT)).clamp(0, height - 1)
        column = ((2 * column + 1) * width // (2 * s.GLYPH_WIDTH)).clamp(0, width - 1)
        ink = boxed & self.glyphs[glyph, row, column]
        colour = self.palettes[palette.expand_as(ink), (~ink).long()]
        index, token = self._address(packed, scene, t, top + y, left + x, shown)
        return index, token, shown & boxed, number, colour

    def _local(
        self, packed: Packed, height: int, width: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Frame, row, column and scene numbers that broadcast to [B, F, height, width]."""
        line = [
            torch.arange(n, device=self.device)
            for n in (packed.frames, height, width, len(packed.kinds))
        ]
        return (
            line[0].view(1, -1, 1, 1), line[1].view(1, 1, -1, 1), line[2].view(1, 1, 1, -1),
            line[3].view(-1, 1, 1, 1),
        )  # fmt: skip

    @staticmethod
    def _address(
        packed: Packed, scene: Tensor, t: Tensor, row: Tensor, column: Tensor, shown: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Flat pixel numbers, a spare one where nothing is shown, and flat token numbers."""
        frames, size = packed.frames, packed.size
        patches, grid = max(frames // 2, 1), size // s.TOKEN
        spare = len(packed.kinds) * frames * size * size + row % SPARE * SPARE + column % SPARE
        pixel = torch.where(shown, ((scene * frames + t) * size + row) * size + column, spare)
        row, column = (v.clamp(0, size - 1) // s.TOKEN for v in (row, column))
        return pixel, ((scene * patches + t // 2) * grid + row) * grid + column
