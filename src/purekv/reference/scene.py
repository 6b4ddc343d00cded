"""What happens in a synthetic video: numpy only, decided wholly by `(seed, index)`.

A video has F frames of `size` x `size` pixels; two frames make one temporal patch of the vision
tower and 28 x 28 pixels one visual token. All quantities here are integers, in pixels and frames.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

TOKEN = 28
MIN_SIZE, MAX_SIZE = 6 * TOKEN, 16 * TOKEN

SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond", "ring", "heart")
COLOURS = {
    "red": (225, 30, 35),
    "green": (30, 165, 50),
    "blue": (35, 70, 235),
    "yellow": (250, 225, 40),
    "purple": (150, 45, 190),
    "orange": (250, 135, 20),
    "white": (250, 250, 250),
    "black": (12, 12, 12),
}
LETTERS = "ABCDEFGHJKLMNPRSTUVWXYZ"
DIGITS = "23456789"
GLYPHS = LETTERS + DIGITS
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
REGIONS = ("top left", "top right", "bottom left", "bottom right", "centre")
BACKGROUNDS = ("plain", "noise", "waves", "footage")

GLYPH_WIDTH, GLYPH_HEIGHT, PLATE_MARGIN = 24, 28, 4
PLATE_WIDTH, PLATE_HEIGHT = 4 * TOKEN + 2 * PLATE_MARGIN, TOKEN + 2 * PLATE_MARGIN
PLATE_COLOURS = (  # text, plate
    ((255, 255, 255), (10, 10, 10)),
    ((0, 0, 0), (250, 250, 250)),
    ((255, 240, 60), (20, 30, 90)),
    ((10, 20, 60), (255, 235, 120)),
)
_GAP = 6  # pixels kept free between two things that share a frame
_EDGE = 3  # pixels kept free at the border of a frame


@dataclass(frozen=True)
class Thing:
    """One object: its top-left corner, `(x, y)` at frame `start`, moves by `(dx, dy)` a frame."""

    shape: str
    colour: str
    size: int
    start: int
    stop: int
    x: int
    y: int
    dx: int = 0
    dy: int = 0

    @property
    def direction(self) -> str | None:
        sign = (int(np.sign(self.dx)), int(np.sign(self.dy)))
        return next((name for name, step in DIRECTIONS.items() if step == sign), None)

    def box(self) -> tuple[int, int, int, int]:
        """The rectangle `(left, top, right, bottom)` swept over the whole life."""
        steps = self.stop - self.start - 1
        xs, ys = (self.x, self.x + steps * self.dx), (self.y, self.y + steps * self.dy)
        return min(xs), min(ys), max(xs) + self.size, max(ys) + self.size


@dataclass(frozen=True)
class Plate:
    """The text code: four glyphs on a plate whose top-left corner is `(x, y)`."""

    code: str
    x: int
    y: int
    start: int
    stop: int
    palette: int

    def box(self) -> tuple[int, int, int, int]:
        return self.x, self.y, self.x + PLATE_WIDTH, self.y + PLATE_HEIGHT


@dataclass(frozen=True)
class Background:
    """`kind`, and eight random integers in [0, 2**16) from which the renderer derives the rest."""

    kind: str
    params: tuple[int, ...]


@dataclass(frozen=True)
class Scene:
    frames: int
    size: int
    background: Background
    things: tuple[Thing, ...]
    plate: Plate

    def region(self, thing: Thing) -> str | None:
        """Where a static thing is, or None if it moves or lies between two regions."""
        if thing.direction is not None:
            return None
        centre_x, centre_y = 2 * thing.x + thing.size, 2 * thing.y + thing.size
        for name, (left, top, right, bottom) in _regions(self.size).items():
            if 2 * left <= centre_x <= 2 * right and 2 * top <= centre_y <= 2 * bottom:
                return name
        return None

    def half(self, thing: Thing) -> str | None:
        """ "first" or "second" if the thing's whole life lies in that half."""
        if 2 * thing.stop <= self.frames:
            return "first"
        return "second" if 2 * thing.start >= self.frames else None


def _regions(size: int) -> dict[str, tuple[int, int, int, int]]:
    """Boxes in which the centre of a thing may lie, with wide gaps between them."""
    low, high = 35 * size // 100, 65 * size // 100
    middle = (44 * size // 100, 56 * size // 100)
    return {
        "top left": (0, 0, low, low),
        "top right": (high, 0, size, low),
        "bottom left": (0, high, low, size),
        "bottom right": (high, high, size, size),
        "centre": (middle[0], middle[0], middle[1], middle[1]),
    }


def check_geometry(frames: int, size: int) -> None:
    if frames != 1 and (frames < 2 or frames % 2):
        raise ValueError(f"frames={frames}: use 1 for images, or an even number of at least 2")
    if size % TOKEN or not MIN_SIZE <= size <= MAX_SIZE:
        raise ValueError(
            f"size={size}: use a multiple of {TOKEN} between {MIN_SIZE} and {MAX_SIZE}, e.g. 280"
        )


def make_scene(seed: int, index: int, frames: int, size: int, kind: str | None = None) -> Scene:
    """Scene `index` of `seed`; `kind` overrides the background's kind."""
    check_geometry(frames, size)
    rng = np.random.default_rng([seed, index])
    count = int(rng.integers(2, 5))
    params = tuple(int(v) for v in rng.integers(0, 2**16, 8))
    drawn = str(rng.choice(BACKGROUNDS, p=(0.2, 0.2, 0.25, 0.35)))
    background = Background(kind or drawn, params)
    while True:
        placed = _place(rng, count, frames, size)
        if placed is not None:
            return Scene(frames, size, background, *placed)


def _place(
    rng: np.random.Generator, count: int, frames: int, size: int
) -> tuple[tuple[Thing, ...], Plate] | None:
    patches = max(frames // 2, 1)
    spans = _spans(rng, count, patches)
    if spans is None:
        return None
    frame = 1 if frames == 1 else 2
    plate = _plate(rng, patches, frame, size)
    shapes = rng.permutation(len(SHAPES))[:count]
    colours = rng.permutation(len(COLOURS))[:count]
    # With two things or more, one moves and one stands still, so that every question can be asked.
    moving = [frames > 1, False] + [
        bool(frames > 1 and rng.random() < 0.5) for _ in range(count - 2)
    ]
    names = tuple(COLOURS)
    things: list[Thing] = []
    taken: list[Thing | Plate] = [plate]
    for k in range(count):
        for _ in range(12):
            thing = _thing(
                rng, SHAPES[shapes[k]], names[colours[k]],
                spans[k][0] * frame, spans[k][1] * frame, size, moving[k],
            )  # fmt: skip
            if thing is not None and not any(_collide(thing, other) for other in taken):
                things.append(thing)
                taken.append(thing)
                break
        else:
            return None
    order = rng.permutation(count)
    return tuple(things[i] for i in order), plate


def _spans(rng: np.random.Generator, count: int, patches: int) -> list[tuple[int, int]] | None:
    """Lives in patches: one within a half, and two that start apart, where time allows it."""
    if patches == 1:
        return [(0, 1)] * count
    shortest = min(3, max(1, patches // 3))
    spans = []
    for _ in range(count):
        low, high = 0, patches
        share = rng.random()
        if share < 0.35:
            high = patches // 2
        elif share < 0.7:
            low = patches - patches // 2
        length = int(rng.integers(shortest, high - low + 1))
        start = int(rng.integers(low, high - length + 1))
        spans.append((start, start + length))
    starts = sorted(start for start, _ in spans)
    halved = any(2 * stop <= patches or 2 * start >= patches for start, stop in spans)
    return spans if halved and starts[-1] - starts[0] >= order_gap(patches) else None


def order_gap(patches: int) -> int:
    """Patches between two first appearances whose order may be asked."""
    return max(1, min(2, patches // 4))


def _plate(rng: np.random.Generator, patches: int, frame: int, size: int) -> Plate:
    code = "".join(str(rng.choice(list(chars))) for chars in (LETTERS, DIGITS, LETTERS, DIGITS))
    length = int(rng.integers(min(patches, max(1, patches // 3)), patches + 1))
    start = int(rng.integers(0, patches - length + 1))
    grid = size // TOKEN
    # Glyphs sit near the token grid (one token a glyph), give or take a few pixels.
    column, row = int(rng.integers(0, grid - 3)), int(rng.integers(0, grid))
    x = column * TOKEN - PLATE_MARGIN + int(rng.integers(-5, 6))
    y = row * TOKEN - PLATE_MARGIN + int(rng.integers(-5, 6))
    return Plate(
        code,
        min(max(x, 0), size - PLATE_WIDTH),
        min(max(y, 0), size - PLATE_HEIGHT),
        start * frame,
        (start + length) * frame,
        int(rng.integers(len(PLATE_COLOURS))),
    )


def _thing(
    rng: np.random.Generator,
    shape: str,
    colour: str,
    start: int,
    stop: int,
    size: int,
    moving: bool,
) -> Thing | None:
    extent = int(rng.integers(32, min(56, size // 5) + 1))
    low, high = _EDGE, size - _EDGE - extent
    if not moving:
        left, top, right, bottom = _regions(size)[str(rng.choice(REGIONS))]
        half = extent // 2
        x = int(rng.integers(max(left - half, low), min(right - half, high) + 1))
        y = int(rng.integers(max(top - half, low), min(bottom - half, high) + 1))
        return Thing(shape, colour, extent, start, stop, x, y)
    steps = stop - start - 1
    fastest = min(9, (high - low) // steps)
    if fastest < 4:
        return None
    speed = int(rng.integers(4, fastest + 1))
    step = list(DIRECTIONS.values())[int(rng.integers(4))]
    along = int(rng.integers(low, high - steps * speed + 1))
    across = int(rng.integers(low, high + 1))
    if min(step) < 0:
        along += steps * speed
    x, y = (along, across) if step[0] else (across, along)
    return Thing(shape, colour, extent, start, stop, x, y, step[0] * speed, step[1] * speed)


def _collide(one: Thing | Plate, two: Thing | Plate) -> bool:
    if one.stop <= two.start or two.stop <= one.start:
        return False
    a, b = one.box(), two.box()
    return not (
        a[2] + _GAP <= b[0] or b[2] + _GAP <= a[0] or a[3] + _GAP <= b[1] or b[3] + _GAP <= a[1]
    )
