"""What is heard in a synthetic video, decided by `(seed, index)`, and its wave: numpy only.

Each event lies in a second of its own. All arithmetic is in integers, so that the samples are the
same on any machine. There is no speech: digits are dialled, in the two tones of a telephone's keys
(ITU-T Q.23).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .scene import LEVEL, Scene

RATE = 16000
"""Samples a second."""
SHORTEST = 6
"""Seconds that have room for all events."""
NOTES = {"low": 300, "middle": 600, "high": 1200}
"""Hertz of a tune's notes."""
BEEP = 1000
BUZZER = 110
_ROWS, _COLUMNS = (697, 770, 852, 941), (1209, 1336, 1477)
_KEYS = ("123", "456", "789", "*0#")
DIAL = {
    key: (_ROWS[row], column)
    for row, keys in enumerate(_KEYS)
    for key, column in zip(keys, _COLUMNS, strict=True)
    if key.isdigit()
}
"""Hertz of each digit's two tones."""

MOST_BEEPS = {"easy": 3, "standard": 5, "hard": 5}
HISS = {"easy": 0, "standard": 150, "hard": 1000}
"""Loudest sample of the noise under everything, of 32,768."""

_TABLE = 4096
_SINE = np.rint(2**13 * np.sin(np.arange(_TABLE) * (2 * np.pi / _TABLE))).astype(np.int64)
_FADE = 80  # samples: without it, ends click


@dataclass(frozen=True)
class Soundtrack:
    """One second each: a tune of three notes, two dialled digits, a buzzer, and every beep."""

    seconds: int
    hiss: int
    buzzer: int
    beeps: tuple[int, ...]
    tune: tuple[int, tuple[str, ...]]
    """When, and the names of its notes."""
    dial: tuple[int, str]
    """When, and the digits."""
    noise: int
    """Seed of the hiss."""


def make_soundtrack(seed: int, index: int, scene: Scene, level: str = LEVEL) -> Soundtrack:
    """The buzzer sounds while one thing is in view, where there is such a moment."""
    rng = np.random.default_rng([seed, index, 2])
    seconds = scene.frames // 2
    alone = [second for second in range(seconds) if len(in_view(scene, second)) == 1]
    buzzer = int(rng.choice(alone or range(seconds)))
    free = [second for second in rng.permutation(seconds).tolist() if second != buzzer]
    most = min(MOST_BEEPS[level], seconds - 3)
    beeps = free[2 : 2 + int(rng.integers(1, most + 1))]
    notes = tuple(tuple(NOTES)[i] for i in rng.permutation(len(NOTES)))
    digits = "".join(str(digit) for digit in rng.integers(0, 10, 2))
    noise = int(rng.integers(2**31))
    return Soundtrack(
        seconds,
        HISS[level],
        buzzer,
        tuple(sorted(beeps)),
        (free[0], notes),
        (free[1], digits),
        noise,
    )


def in_view(scene: Scene, second: int) -> list[int]:
    """Numbers of the things that are seen in a second, or in a part of it."""
    first, last = 2 * second, 2 * second + 1
    return [k for k, thing in enumerate(scene.things) if thing.start <= last and thing.stop > first]


def wave(track: Soundtrack) -> np.ndarray:
    """int16 [seconds * RATE]."""
    out = np.zeros((track.seconds, RATE), np.int64)
    if track.hiss:
        rng = np.random.default_rng(track.noise)
        out += rng.integers(-track.hiss, track.hiss + 1, out.shape)

    def put(second: int, milliseconds: int, sound: np.ndarray) -> None:
        start = milliseconds * RATE // 1000
        out[second, start : start + len(sound)] += sound

    put(track.buzzer, 50, _sound([BUZZER * k for k in (1, 2, 3, 5, 7)], 900))
    for second in track.beeps:
        put(second, 400, _sound([BEEP], 150))
    for place, note in enumerate(track.tune[1]):
        put(track.tune[0], 50 + 300 * place, _sound([NOTES[note]], 300))
    for place, digit in enumerate(track.dial[1]):
        put(track.dial[0], 100 + 450 * place, _sound(DIAL[digit], 350))
    return out.reshape(-1).astype(np.int16)


def _sound(hertz: Sequence[int], milliseconds: int) -> np.ndarray:
    """Sines together, int64 [samples], a quarter of full scale for one."""
    time = np.arange(milliseconds * RATE // 1000)
    phases = (time * (frequency * _TABLE) // RATE % _TABLE for frequency in hertz)
    total = sum((_SINE[phase] for phase in phases), np.zeros_like(time)) // max(1, len(hertz) // 2)
    ends = np.minimum(time + 1, len(time) - time)
    return total * np.minimum(ends, _FADE) // _FADE
