"""What happens in a synthetic video, image or page: numpy only, decided by `(seed, index)`.

A video has F frames of `size` x `size` pixels; two frames make one temporal patch of the vision
tower, which is one second, and 28 x 28 pixels make one visual token. All quantities here are
integers, in pixels and frames.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

TOKEN = 28
MIN_SIZE, MAX_SIZE = 6 * TOKEN, 16 * TOKEN
MAX_PAGE = 32 * TOKEN
MAX_FRAMES = 128

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
DIGITS = "23456789"  # of codes: no 0 and 1, which look like letters
GLYPHS = LETTERS + DIGITS + "01"
BOARD = (10, 100)  # its numbers, the end excluded
DIRECTIONS = {
    "left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1),
    "up left": (-1, -1), "up right": (1, -1), "down left": (-1, 1), "down right": (1, 1),
}  # fmt: skip
REGIONS = tuple(
    " ".join(part for part in (row, column) if part) or "centre"
    for row in ("top", "", "bottom")
    for column in ("left", "", "right")
)
BACKGROUNDS = ("plain", "noise", "waves", "footage", "palms", "photo")
PALETTES = {  # plate, text
    "black": ((10, 10, 10), (255, 255, 255)),
    "white": ((250, 250, 250), (0, 0, 0)),
    "yellow": ((250, 225, 40), (0, 0, 0)),
    "blue": ((25, 45, 190), (255, 255, 255)),
    "red": ((190, 20, 30), (255, 255, 255)),
    "green": ((15, 110, 40), (255, 255, 255)),
    "board": ((75, 75, 80), (255, 250, 200)),
    "clock": ((0, 0, 0), (255, 190, 60)),
    "paper": ((240, 238, 228), (15, 15, 20)),
    "night": ((22, 26, 34), (225, 228, 235)),
}
SIGN_COLOURS = tuple(PALETTES)[:6]
MAX_THINGS, MAX_SIGNS = 7, 3
LARGEST = 56  # pixels of a thing
ENTRY, GAP = 7, 2  # characters of a page's entry, "K7 H2N4", and between two in a line
MARGIN = 4  # pixels of plate around a text
_GAP = 6  # pixels kept free between two things that share a frame
_EDGE = 3  # pixels kept free at the border of a frame


@dataclass(frozen=True)
class Level:
    """How hard a scene is. Ranges are inclusive."""

    things: tuple[int, int]
    extent: tuple[int, int]  # pixels of a thing
    life: tuple[int, int]  # patches that a thing or a sign is seen; longer lives reach the whole
    signs: tuple[int, int]
    character: tuple[int, int]  # pixels a character is wide
    asked: tuple[int, int]  # things that one question is about
    columns: int  # entries in a line of a page, at most
    shake: int  # pixels that a frame jumps, at most
    drift: int  # 256ths that the brightness leaves 1, at most


LEVELS = {
    "easy": Level((2, 4), (32, 56), (3, 99), (1, 1), (20, 26), (1, 1), 1, 0, 0),
    "standard": Level((3, 6), (24, 48), (1, 3), (1, 2), (14, 22), (2, 2), 2, 2, 40),
    "hard": Level((4, 7), (22, 36), (1, 2), (2, 3), (14, 17), (2, 3), 4, 3, 70),
}
LEVEL = "standard"


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
class Text:
    """Lines of characters in a grid of `width` x `height` cells, on a plate with a margin."""

    role: str  # sign, clock, board or page
    colour: str  # of PALETTES
    x: int  # of the plate's top-left corner
    y: int
    width: int
    height: int
    start: int
    stop: int
    states: tuple[str, ...]  # what it says in each patch of its life; one if it never changes

    def box(self) -> tuple[int, int, int, int]:
        lines = self.states[0].split("\n")
        columns = max(len(line) for line in lines)
        right, bottom = columns * self.width, len(lines) * self.height
        return self.x, self.y, self.x + right + 2 * MARGIN, self.y + bottom + 2 * MARGIN


@dataclass(frozen=True)
class Camera:
    """Background pan in pixels a frame, each patch's jump, and the brightness in 256ths."""

    pan: tuple[int, int] = (0, 0)
    shake: tuple[tuple[int, int], ...] = ()  # (x, y) a patch; of all but clock and page
    gain: tuple[int, int] = (256, 256)  # of the first and the last frame


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
    camera: Camera
    things: tuple[Thing, ...] = ()
    texts: tuple[Text, ...] = ()

    @property
    def signs(self) -> list[Text]:
        return self.of_role("sign")

    def of_role(self, role: str) -> list[Text]:
        return [text for text in self.texts if text.role == role]

    def region(self, thing: Thing) -> str | None:
        """Where a static thing is, or None if it moves or lies between two regions."""
        if thing.direction is not None:
            return None
        names = []
        for corner in (thing.y, thing.x):
            centre = 2 * corner + thing.size
            bands = _bands(self.size)
            names.append(
                next((k for k, (a, b) in enumerate(bands) if 2 * a <= centre <= 2 * b), None)
            )
        row, column = names
        return None if row is None or column is None else REGIONS[3 * row + column]

    def half(self, thing: Thing) -> str | None:
        """ "first" or "second" if the thing's whole life lies in that half."""
        if 2 * thing.stop <= self.frames:
            return "first"
        return "second" if 2 * thing.start >= self.frames else None

    def entries(self) -> dict[str, str]:
        """Of a page: label to what is written after it."""
        words = [word for page in self.of_role("page") for word in page.states[0].split()]
        return dict(zip(words[::2], words[1::2], strict=True))


def _bands(size: int) -> list[tuple[int, int]]:
    """Where the centre of a thing may lie along one axis, with gaps between the three."""
    return [(0, 29 * size // 100), (42 * size // 100, 58 * size // 100), (71 * size // 100, size)]


def check_geometry(frames: int, size: int, page: bool = False) -> None:
    if frames != 1 and (frames < 2 or frames % 2 or frames > MAX_FRAMES):
        raise ValueError(
            f"frames={frames}: use 1 for images, or an even number from 2 to {MAX_FRAMES}"
        )
    largest = MAX_PAGE if page else MAX_SIZE
    if size % TOKEN or not MIN_SIZE <= size <= largest:
        raise ValueError(
            f"size={size}: use a multiple of {TOKEN} between {MIN_SIZE} and {largest}, e.g. 280"
        )


def make_scene(
    seed: int, index: int, frames: int, size: int, level: str = LEVEL, kind: str | None = None
) -> Scene:
    """Scene `index` of `seed`; `kind` overrides the background's kind."""
    check_geometry(frames, size)
    rng = np.random.default_rng([seed, index])
    rules = LEVELS[level]
    params = tuple(int(v) for v in rng.integers(0, 2**16, 8))
    drawn = str(rng.choice(BACKGROUNDS, p=(0.1, 0.12, 0.15, 0.24, 0.14, 0.25)))
    background = Background(kind or drawn, params)
    camera = _camera(rng, frames, rules)
    while True:
        placed = _place(rng, frames, size, rules)
        if placed is not None:
            return Scene(frames, size, background, camera, *placed)


def make_pages(
    seed: int, index: int, count: int, size: int, level: str = LEVEL
) -> tuple[Scene, ...]:
    """`count` pages of text, no label twice; each entry is a label and a code."""
    check_geometry(1, size, page=True)
    rng = np.random.default_rng([seed, index])
    rules = LEVELS[level]
    labels = [a + b for a in LETTERS for b in DIGITS]
    order = iter(rng.permutation(len(labels)))
    pages = []
    for _ in range(count):
        room = size - 2 * MARGIN - 2 * _EDGE
        width = min(_between(rng, rules.character), room // ENTRY)
        height = max(TOKEN, width * 7 // 6 + 4) + int(rng.integers(0, 5))
        fit = (room // width + GAP) // (ENTRY + GAP)
        columns = min(fit, int(rng.integers(1, rules.columns + 1)))
        most = min(room // height, len(labels) // count // columns)
        lines = int(rng.integers(max(2, most // 2), most + 1))
        text = "\n".join(
            "  ".join(f"{labels[next(order)]} {_code(rng)}" for _ in range(columns))
            for _ in range(lines)
        )
        colour = "paper" if rng.random() < 0.6 else "night"
        page = Text("page", colour, 0, 0, width, height, 0, 1, (text,))
        right, bottom = page.box()[2:]
        x = int(rng.integers(_EDGE, max(_EDGE, size - _EDGE - right) + 1))
        y = int(rng.integers(_EDGE, max(_EDGE, size - _EDGE - bottom) + 1))
        page = Text("page", colour, x, y, width, height, 0, 1, (text,))
        params = tuple(int(v) for v in rng.integers(0, 2**16, 8))
        kind = "plain" if rng.random() < 0.5 else "photo"
        pages.append(Scene(1, size, Background(kind, params), Camera(), (), (page,)))
    return tuple(pages)


def _between(rng: np.random.Generator, bounds: tuple[int, int]) -> int:
    return int(rng.integers(bounds[0], bounds[1] + 1))


def _code(rng: np.random.Generator) -> str:
    return "".join(
        chars[int(rng.integers(len(chars)))] for chars in (LETTERS, DIGITS, LETTERS, DIGITS)
    )


def _camera(rng: np.random.Generator, frames: int, rules: Level) -> Camera:
    pan = (int(rng.integers(-3, 4)), int(rng.integers(-2, 3)))
    low, high = 256 - rules.drift, 256 + rules.drift // 2
    gain = (_between(rng, (low, high)), _between(rng, (low, high)))
    jumps = rng.integers(-rules.shake, rules.shake + 1, ((frames + 1) // 2, 2))
    shake = tuple((int(x), int(y)) for x, y in jumps)
    return Camera(pan if frames > 1 else (0, 0), shake, gain)


def _place(
    rng: np.random.Generator, frames: int, size: int, rules: Level
) -> tuple[tuple[Thing, ...], tuple[Text, ...]] | None:
    patches = max(frames // 2, 1)
    frame = 1 if frames == 1 else 2
    grid = size // TOKEN
    taken: list[Thing | Text] = []

    def add(draw) -> bool:  # type: ignore[no-untyped-def]
        for _ in range(24):
            candidate = draw()
            if candidate is not None and not any(
                _collide(candidate, other, _GAP + 2 * rules.shake) for other in taken
            ):
                taken.append(candidate)
                return True
        return False

    texts = 0
    width = _between(rng, rules.character)
    if patches > 2 and rng.random() < 0.7:
        times = tuple(f"{k:02d}" for k in range(patches))
        numbers = tuple(f"{int(rng.integers(*BOARD))}" for _ in range(patches))
        for role, states in (("clock", times), ("board", numbers)):
            colour, span = role, (0, frames)
            if not add(lambda: _text(rng, role, colour, states, width, span, size, rules)):  # noqa: B023
                return None
            texts += 1
    signs = _between(rng, rules.signs)
    if frames == 1 and grid < 9:
        signs = 1
    colours = rng.permutation(len(SIGN_COLOURS))
    for k in range(signs):
        span = _span(rng, patches, frame, rules)
        colour, width = SIGN_COLOURS[colours[k]], _between(rng, rules.character)
        if not add(lambda: _text(rng, "sign", colour, (_code(rng),), width, span, size, rules)):  # noqa: B023
            return None
        texts += 1
    most = rules.things[1] if patches * grid**2 >= 400 else min(5, rules.things[1])
    count = _between(rng, (rules.things[0], max(rules.things[0], most)))
    if patches == 1 and grid < 9:
        count = min(count, 4)
    looks = zip(
        rng.permutation(len(SHAPES))[:count], rng.permutation(len(COLOURS))[:count], strict=True
    )
    names = tuple(COLOURS)
    for k, (shape, tint) in enumerate(looks):
        # The first two move and the next two stand still, so that every question can be asked.
        moving = frames > 1 and (k < 2 if k < 4 else rng.random() < 0.4)
        if not add(lambda: _thing(rng, SHAPES[shape], names[tint], frames, size, moving, rules)):  # noqa: B023
            return None
    things = tuple(taken[texts:])
    order = rng.permutation(count)
    return tuple(things[i] for i in order), tuple(taken[:texts])  # type: ignore[arg-type]


def _span(rng: np.random.Generator, patches: int, frame: int, rules: Level) -> tuple[int, int]:
    """First frame and the one behind the last."""
    shortest = min(rules.life[0], patches)
    length = _between(rng, (shortest, max(shortest, min(rules.life[1], patches))))
    start = int(rng.integers(0, patches - length + 1))
    return start * frame, (start + length) * frame


def _text(
    rng: np.random.Generator, role: str, colour: str, states: tuple[str, ...], width: int,
    span: tuple[int, int], size: int, rules: Level,
) -> Text | None:  # fmt: skip
    height = width * 7 // 6 + 1
    text = Text(role, colour, 0, 0, width, height, *span, states)
    low, (right, bottom) = _EDGE + rules.shake, text.box()[2:]
    high_x, high_y = size - low - right, size - low - bottom
    if min(high_x, high_y) < low:
        return None
    x, y = int(rng.integers(low, high_x + 1)), int(rng.integers(low, high_y + 1))
    return Text(role, colour, x, y, width, height, *span, states)


def _thing(
    rng: np.random.Generator, shape: str, colour: str, frames: int, size: int, moving: bool,
    rules: Level,
) -> Thing | None:  # fmt: skip
    start, stop = _span(rng, max(frames // 2, 1), 1 if frames == 1 else 2, rules)
    extent = _between(rng, (rules.extent[0], min(rules.extent[1], size // 5)))
    low = _EDGE + rules.shake
    high = size - low - extent
    if not moving:
        corner = []
        for k in rng.integers(0, 3, 2):
            first, last = _bands(size)[int(k)]
            corner.append(
                int(rng.integers(max(first - extent // 2, low), min(last - extent // 2, high) + 1))
            )
        return Thing(shape, colour, extent, start, stop, corner[0], corner[1])
    steps = stop - start - 1
    fastest = min(9, (high - low) // steps)
    if fastest < 4:
        return None
    step = list(DIRECTIONS.values())[int(rng.integers(len(DIRECTIONS)))]
    speed = int(rng.integers(4, fastest + 1))
    corner = []
    for sign in step:
        reach = steps * speed if sign else 0
        corner.append(int(rng.integers(low, high - reach + 1)) + (reach if sign < 0 else 0))
    return Thing(
        shape, colour, extent, start, stop, corner[0], corner[1], step[0] * speed, step[1] * speed
    )


def _collide(one: Thing | Text, two: Thing | Text, gap: int) -> bool:
    if one.stop <= two.start or two.stop <= one.start:
        return False
    a, b = one.box(), two.box()
    return not (
        a[2] + gap <= b[0] or b[2] + gap <= a[0] or a[3] + gap <= b[1] or b[3] + gap <= a[1]
    )
