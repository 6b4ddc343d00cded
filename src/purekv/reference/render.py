"""Scenes to pixels, the same integers on CPU and GPU: masks are sampled from a large atlas.

Shapes below: B scenes, F frames, P pixels a side, K things, G x G visual tokens a frame, T patches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from . import scene as s
from .colour import planes_to_rgb

ASSETS = Path(__file__).parent / "assets"
ATLAS_SHAPE = 128
ATLAS_GLYPH = (96, 112)
GLYPHS_PER_ROW = 10
CLIPS = {"footage": "footage.mp4", "palms": "footage2.mp4", "photo": "photos.mp4"}
SPARE = 64
_DARK = ("blue", "purple", "black")
_COLOURS = tuple(s.COLOURS)
_PALETTES = tuple(s.PALETTES)
_SLOTS = ("clock", "board", "page", *["sign"] * s.MAX_SIGNS)  # one text each


@dataclass
class Texts:
    """One text of each of B scenes; int64."""

    role: str
    fields: Tensor  # [B, 7] x, y, character width and height, start, stop, palette; absent: stop 0
    table: Tensor  # [B, states, lines, columns] glyph numbers, -1 for none
    height: int  # pixels of the largest plate
    width: int

    def to(self, device: torch.device | str) -> Texts:
        fields, table = (t.to(device, non_blocking=True) for t in (self.fields, self.table))
        return replace(self, fields=fields, table=table)


@dataclass
class Packed:
    """B scenes of one geometry as int64 tensors, ready for any device."""

    frames: int
    size: int
    kinds: Tensor  # [B] index of the background's kind
    params: Tensor  # [B, 8]
    pan: Tensor  # [B, 2] pixels a frame
    shake: Tensor  # [B, T, 2]
    gain: Tensor  # [B, F] 256ths
    things: Tensor  # [B, K, 9] shape, colour, size, start, stop, x, y, dx, dy; absent: size 0
    texts: list[Texts]

    def to(self, device: torch.device | str) -> Packed:
        moved = {
            name: getattr(self, name).to(device, non_blocking=True)
            for name in ("kinds", "params", "pan", "shake", "gain", "things")
        }
        return replace(self, **moved, texts=[texts.to(device) for texts in self.texts])


def pack(scenes: Sequence[s.Scene]) -> Packed:
    frames = scenes[0].frames
    patches = max(frames // 2, 1)
    most = max(1, max(len(scene.things) for scene in scenes))
    things = np.zeros((len(scenes), most, 9), np.int64)
    shake = np.zeros((len(scenes), patches, 2), np.int64)
    gain = np.zeros((len(scenes), frames), np.int64)
    for b, scene in enumerate(scenes):
        for k, t in enumerate(scene.things):
            look = (s.SHAPES.index(t.shape), _COLOURS.index(t.colour))
            things[b, k] = (*look, t.size, t.start, t.stop, t.x, t.y, t.dx, t.dy)
        if scene.camera.shake:
            shake[b] = scene.camera.shake
        first, last = scene.camera.gain
        gain[b] = first + (last - first) * np.arange(frames) // max(1, frames - 1)
    return Packed(
        frames,
        scenes[0].size,
        torch.tensor([s.BACKGROUNDS.index(scene.background.kind) for scene in scenes]),
        torch.tensor([scene.background.params for scene in scenes]),
        torch.tensor([scene.camera.pan for scene in scenes]),
        torch.from_numpy(shake),
        torch.from_numpy(gain),
        torch.from_numpy(things),
        _pack_texts(scenes),
    )


def _pack_texts(scenes: Sequence[s.Scene]) -> list[Texts]:
    packed = []
    for number, role in enumerate(_SLOTS):
        rank = number - _SLOTS.index(role)
        texts = [dict(enumerate(scene.of_role(role))).get(rank) for scene in scenes]
        present = [(b, text) for b, text in enumerate(texts) if text is not None]
        if not present:
            continue
        grids = {b: [state.split("\n") for state in text.states] for b, text in present}
        states = max(len(grid) for grid in grids.values())
        lines = max(len(grid[0]) for grid in grids.values())
        columns = max(len(line) for grid in grids.values() for line in grid[0])
        table = np.full((len(scenes), states, lines, columns), -1, np.int64)
        fields = np.zeros((len(scenes), 7), np.int64)
        height = width = 0
        for b, t in present:
            palette = _PALETTES.index(t.colour)
            fields[b] = (t.x, t.y, t.width, t.height, t.start, t.stop, palette)
            for i, grid in enumerate(grids[b]):
                for j, line in enumerate(grid):
                    table[b, i, j, : len(line)] = [s.GLYPHS.find(c) for c in line]
            if len(grids[b]) == 1:
                table[b, 1:] = table[b, :1]
            left, top, right, bottom = t.box()
            height, width = max(height, bottom - top), max(width, right - left)
        packed.append(Texts(role, torch.from_numpy(fields), torch.from_numpy(table), height, width))
    return packed


def load_clip(name: str) -> np.ndarray:
    """A shipped clip as uint8 [N, H, W, 3]; the same bytes wherever H.264 is decoded."""
    import av

    with av.open(str(ASSETS / name)) as clip:
        clip.streams.video[0].thread_type = "NONE"
        frames = [frame.to_ndarray(format="yuv420p") for frame in clip.decode(video=0)]
    return np.stack([planes_to_rgb(planes[None])[0] for planes in frames])


@dataclass(frozen=True)
class Owners:
    """What each visual token shows, int64 [B, T, G, G]."""

    thing: Tensor  # 0 nothing, k + 1: most of the token's owned pixels are thing k's
    text: Tensor  # 0 nothing, n + 1: a character's centre of text n of `Packed.texts`
    left: Tensor  # glyph number + 1 of that character, 0 for none
    right: Tensor  # of a second character in the same token
    letter: Tensor  # glyph numbers + 1 of the label of a page's entry, 0 for none
    digit: Tensor


class Renderer:
    """Holds the atlas, the footage and the photographs on one device."""

    def __init__(
        self,
        device: torch.device | str = "cpu",
        read: Callable[[str], np.ndarray] = load_clip,
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
        self.clips = {
            kind: torch.from_numpy(np.ascontiguousarray(read(name))).to(self.device)
            for kind, name in CLIPS.items()
        }
        fill = np.array(list(s.COLOURS.values()), np.uint8)
        outline = np.array([(250,) * 3 if c in _DARK else (5,) * 3 for c in _COLOURS], np.uint8)
        self.colours = torch.from_numpy(np.stack([outline, fill])).to(
            self.device
        )  # [2, colours, 3]
        palettes = torch.tensor(list(s.PALETTES.values()), dtype=torch.int32)
        self.palettes = palettes.to(self.device)  # [palettes, 2, 3] plate, ink
        wave = np.rint(127 * np.sin(np.arange(256) * (2 * np.pi / 256))).astype(np.int32)
        self.wave = torch.from_numpy(wave).to(self.device)

    @torch.no_grad()
    def __call__(self, packed: Packed) -> Tensor:
        """uint8 [B, F, 3, P, P]."""
        return self.render(packed)[0].permute(0, 1, 4, 2, 3).contiguous()

    @torch.no_grad()
    def render(self, packed: Packed) -> tuple[Tensor, Owners]:
        """Pixels, uint8 [B, F, P, P, 3], and what each token shows."""
        # Nothing below waits for the device, so that a trainer can draw the next batch meanwhile.
        kinds = packed.kinds.tolist()
        has_gain = bool((packed.gain != 256).any())
        packed = packed.to(self.device)
        batch, frames, size = len(kinds), packed.frames, packed.size
        pixels = batch * frames * size * size
        # Spare pixels at the end take what lies outside a mask.
        canvas = torch.empty(pixels + SPARE**2, 3, dtype=torch.uint8, device=self.device)
        canvas[:pixels] = self._backgrounds(packed, kinds).view(-1, 3)
        patches, grid, things = max(frames // 2, 1), size // s.TOKEN, packed.things.shape[1]
        shape = (batch, patches, grid, grid)
        tokens = batch * patches * grid**2
        votes = torch.zeros(tokens * things, dtype=torch.int32, device=self.device)
        for k in range(things):
            index, token, shown, colour = self._thing(packed, k)
            canvas[index] = colour
            votes.index_add_(0, (token * things + k).flatten(), shown.flatten().int())
        most, owner = votes.view(-1, things).max(-1)
        enough = 100 * (2 if frames > 1 else 1)
        thing = torch.where(most >= enough, owner + 1, 0).view(shape)
        # One spare token at the end takes what is not to be marked.
        marks = {
            name: torch.zeros(tokens + 1, dtype=torch.long, device=self.device)
            for name in ("text", "left", "right", "letter", "digit")
        }
        for number, texts in enumerate(packed.texts):
            index, colour = self._text(packed, texts)
            canvas[index] = colour
            self._mark(packed, texts, number, marks)
        image = canvas[:pixels].view(batch, frames, size, size, 3)
        if has_gain:
            gain = packed.gain.int().view(batch, frames, 1, 1, 1)
            image = ((image.int() * gain) >> 8).clamp_(max=255).to(torch.uint8)
        return image, Owners(
            thing, **{name: mark[:tokens].view(shape) for name, mark in marks.items()}
        )

    def _backgrounds(self, packed: Packed, kinds: list[int]) -> Tensor:
        batch, frames, size = len(kinds), packed.frames, packed.size
        out = torch.empty(batch, frames, size, size, 3, dtype=torch.uint8, device=self.device)
        drawn = {"plain": self._plain, "noise": self._noise, "waves": self._waves}
        for number, kind in enumerate(s.BACKGROUNDS):
            rows = [b for b in range(batch) if kinds[b] == number]
            if rows:
                chosen = torch.tensor(rows, device=self.device)
                pan = packed.pan[chosen].int().view(-1, 2, 1, 1, 1).unbind(1)
                p = packed.params[chosen]
                if kind in drawn:
                    out[chosen] = drawn[kind](p, pan, frames, size)
                else:
                    out[chosen] = self._clip(
                        self.clips[kind], kind == "photo", p, pan, frames, size
                    )
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

    def _plain(self, p: Tensor, pan: Sequence[Tensor], frames: int, size: int) -> Tensor:
        return self._base(p).to(torch.uint8).expand(-1, frames, size, size, 3)

    def _noise(self, p: Tensor, pan: Sequence[Tensor], frames: int, size: int) -> Tensor:
        t, y, x = self._axes(frames, size)
        x, y = x + t * pan[0] + 512, y + t * pan[1] + 512
        p = p.int()
        cell, seed, alive = (v.view(-1, 1, 1, 1) for v in (2 + p[:, 3] % 7, p[:, 4], p[:, 5] & 1))
        mix = (
            (x // cell) * 73856093 ^ (y // cell) * 19349663 ^ (t * alive) * 83492791 ^ seed * 40503
        )
        mix = (mix ^ (mix >> 15)) * 1274126177
        grain = ((mix >> 11) & 63) - 32
        return (self._base(p) + grain[..., None]).to(torch.uint8)

    def _waves(self, p: Tensor, pan: Sequence[Tensor], frames: int, size: int) -> Tensor:
        t, y, x = self._axes(frames, size)
        x, y = x + t * pan[0], y + t * pan[1]
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

    def _clip(
        self, clip: Tensor, still: bool, p: Tensor, pan: Sequence[Tensor], frames: int, size: int
    ) -> Tensor:
        """A window of the clip that moves with the camera, darkened so that objects stand out."""
        count = len(clip)
        p = p.view(-1, 8, 1, 1, 1)
        if still:
            moment = p[:, 2] % count
        else:  # to the end and back
            time = self._axes(frames, size)[0].long()
            moment = (p[:, 2] + time * (1 + p[:, 1] % 3)) % (2 * count - 2)
            moment = torch.minimum(moment, 2 * count - 2 - moment)
        _, height, width, _ = clip.shape
        t, y, x = (v.long() for v in self._axes(frames, size))
        low = min(size * 3 // 4, height)
        window = low + p[:, 0] % (height - low + 1)
        room_x, room_y = width - window, height - window
        across = p[:, 3] % (room_x + 1) + t * pan[0]
        down = p[:, 5] % (room_y + 1) + t * pan[1]
        row = torch.clamp(down, min=0).minimum(room_y) + y * window // size
        column = torch.clamp(across, min=0).minimum(room_x) + x * window // size
        picture = clip.view(-1, 3)[(moment * height + row) * width + column]
        return (44 + picture.int() * 5 // 8).to(torch.uint8)

    def _thing(self, packed: Packed, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Pixel index, token index, what is shown, all [B, F, S, S], and colour [..., 3]."""
        fields = packed.things[:, k].view(-1, 9, 1, 1, 1).unbind(1)
        shape, colour, extent, start, stop, left, top, dx, dy = fields
        t, y, x, scene = self._local(packed, s.LARGEST, s.LARGEST)
        inside = (x < extent) & (y < extent) & (t >= start) & (t < stop)
        scale = 2 * extent.clamp(min=1)
        row = ((2 * y + 1) * ATLAS_SHAPE // scale).clamp(max=ATLAS_SHAPE - 1)
        column = ((2 * x + 1) * ATLAS_SHAPE // scale).clamp(max=ATLAS_SHAPE - 1)
        level = self.shapes[shape, row, column]
        shown = inside & (level > 0)
        age = t - start
        jump_x, jump_y = self._jumps(packed)
        row, column = top + dy * age + y + jump_y, left + dx * age + x + jump_x
        index, token = self._address(packed, scene, t, row, column, shown)
        return (
            index,
            token,
            shown,
            self.colours[(level > 200).long(), colour].expand(*index.shape, 3),
        )

    def _text(self, packed: Packed, texts: Texts) -> tuple[Tensor, Tensor]:
        """Pixel index [B, F, h, w] and colour [..., 3] of a plate with its characters."""
        left, top, width, height, start, stop, palette = texts.fields.view(-1, 7, 1, 1, 1).unbind(1)
        t, y, x, scene = self._local(packed, texts.height, texts.width)
        states, lines, columns = texts.table.shape[1:]
        width, height = width.clamp(min=8), height.clamp(min=8)  # absent ones are 0
        used = texts.table.amax(1) >= 0  # [B, lines, columns]
        rows_used = used.any(2).sum(1).view(-1, 1, 1, 1)
        last = torch.arange(1, columns + 1, device=self.device) * used.any(1)
        columns_used = last.amax(1).view(-1, 1, 1, 1)
        shown = (t >= start) & (t < stop)
        shown = shown & (y < rows_used * height + 2 * s.MARGIN)
        shown = shown & (x < columns_used * width + 2 * s.MARGIN)
        row, column = (y - s.MARGIN) // height, (x - s.MARGIN) // width
        inside = (row >= 0) & (row < lines) & (column >= 0) & (column < columns)
        state = ((t - start) // 2).clamp(0, states - 1)
        cell = (scene * states + state) * lines + row.clamp(0, lines - 1)
        glyph = texts.table.flatten()[cell * columns + column.clamp(0, columns - 1)]
        inside = inside & (glyph >= 0)
        # A character fills its cell but for a pixel at the right, and hangs from the top.
        wide, high = width - 1, (width - 1) * 7 // 6
        across, down = (x - s.MARGIN) - column * width, (y - s.MARGIN) - row * height
        inside = inside & (across < wide) & (down < high)
        glyph = glyph.clamp(min=0)
        ink = torch.zeros_like(glyph, dtype=torch.int32)
        for dy in (1, 3):  # four samples a pixel
            for dx in (1, 3):
                v = ((4 * down + dy) * ATLAS_GLYPH[1] // (4 * high)).clamp(0, ATLAS_GLYPH[1] - 1)
                u = ((4 * across + dx) * ATLAS_GLYPH[0] // (4 * wide)).clamp(0, ATLAS_GLYPH[0] - 1)
                ink += (inside & self.glyphs[glyph, v, u]).int()
        plate, letter = self.palettes[palette.flatten()].view(-1, 2, 1, 1, 1, 3).unbind(1)
        colour = (((4 - ink[..., None]) * plate + ink[..., None] * letter) // 4).to(torch.uint8)
        jump_x, jump_y = self._jumps(packed, texts.role)
        index, _ = self._address(packed, scene, t, top + y + jump_y, left + x + jump_x, shown)
        return index, colour

    def _mark(self, packed: Packed, texts: Texts, number: int, marks: dict[str, Tensor]) -> None:
        """Write down in which token the centre of each character lies."""
        left, top, width, height, start, stop, _ = texts.fields.view(-1, 7, 1, 1, 1).unbind(1)
        states, lines, columns = texts.table.shape[1:]
        batch, patches, grid = len(packed.kinds), max(packed.frames // 2, 1), packed.size // s.TOKEN
        b, t, row, column = (
            torch.arange(n, device=self.device).view([-1 if i == j else 1 for j in range(4)])
            for i, n in enumerate((batch, patches, lines, columns))
        )
        frame = t * (2 if packed.frames > 1 else 1)
        state = ((frame - start) // 2).clamp(0, states - 1)
        glyph = texts.table[b, state, row, column]
        shown = (glyph >= 0) & (frame >= start) & (frame < stop)
        jump_x, jump_y = self._jumps(packed, texts.role, each=1)
        x = left + s.MARGIN + column * width + width // 2 + jump_x
        y = top + s.MARGIN + row * height + width // 2 + jump_y
        at = x.clamp(0, packed.size - 1) // s.TOKEN
        token = ((b * patches + t) * grid + y.clamp(0, packed.size - 1) // s.TOKEN) * grid + at
        second = (x - width) // s.TOKEN == at  # the character before is in the same token
        second = second & (column > 0) & shown.roll(1, -1)

        def mark(name: str, chosen: Tensor, value: Tensor) -> None:
            spare = len(marks[name]) - 1
            marks[name][torch.where(chosen, token, spare)] = value

        mark("left", shown & ~second, glyph + 1)
        mark("right", shown & second, glyph + 1)
        mark("text", shown, torch.full_like(glyph, number + 1))
        if texts.role == "page":
            pitch = s.ENTRY + s.GAP
            for offset, name in enumerate(("letter", "digit")):
                label = texts.table[b, state, row, column // pitch * pitch + offset]
                mark(name, shown, label + 1)

    @staticmethod
    def _jumps(packed: Packed, role: str = "", each: int = 2) -> list[Tensor]:
        """x and y of each frame, [B, F, 1, 1] (of each patch if `each` is 1)."""
        shake = packed.shake if role not in ("clock", "page") else torch.zeros_like(packed.shake)
        if packed.frames > 1:
            shake = shake.repeat_interleave(each, 1)
        return [v[..., None, None] for v in shake.unbind(-1)]

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
