"""Scenes and questions: decided by the seed, free of overlaps, and true."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from purekv.reference.data import samples
from purekv.reference.questions import CATEGORIES, IMAGE_CATEGORIES, categories, chat, name
from purekv.reference.scene import COLOURS, SHAPES, Plate, Scene, Thing, check_geometry, make_scene

GEOMETRIES = [(20, 280), (32, 168), (18, 252), (4, 168), (2, 196), (1, 280), (20, 448)]


def scenes(frames: int, size: int, n: int = 60) -> list[Scene]:
    return [make_scene(3, i, frames, size) for i in range(n)]


@pytest.mark.parametrize(("frames", "size"), GEOMETRIES)
def test_a_scene_is_decided_by_its_seed(frames: int, size: int) -> None:
    assert scenes(frames, size, 5) == scenes(frames, size, 5)
    assert scenes(frames, size, 1)[0] != make_scene(4, 0, frames, size)


@pytest.mark.parametrize(("frames", "size"), GEOMETRIES)
def test_nothing_hides_or_leaves_the_frame(frames: int, size: int) -> None:
    for scene in scenes(frames, size):
        parts: list[Thing | Plate] = [*scene.things, scene.plate]
        for part in parts:
            assert 0 <= part.start < part.stop <= frames
        for frame in range(frames):
            boxes = []
            for part in parts:
                if part.start <= frame < part.stop:
                    left, top, right, bottom = part.box()
                    if isinstance(part, Thing):
                        left = part.x + part.dx * (frame - part.start)
                        top = part.y + part.dy * (frame - part.start)
                        right, bottom = left + part.size, top + part.size
                    assert min(left, top) >= 0
                    assert max(right, bottom) <= size
                    boxes.append((left, top, right, bottom))
            for i, a in enumerate(boxes):
                for b in boxes[i + 1 :]:
                    assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


@pytest.mark.parametrize(("frames", "size"), GEOMETRIES)
def test_things_cannot_be_confused(frames: int, size: int) -> None:
    for scene in scenes(frames, size):
        count = len(scene.things)
        assert 2 <= count <= 4
        assert (
            len({t.shape for t in scene.things}) == len({t.colour for t in scene.things}) == count
        )


def centre_region(thing: Thing, size: int) -> str:
    """Found anew, by thirds of the frame."""
    x, y = thing.x + thing.size / 2, thing.y + thing.size / 2
    row = "top" if y < size / 3 * 1.1 else "bottom" if y > size / 3 * 1.9 else "centre"
    column = "left" if x < size / 3 * 1.1 else "right" if x > size / 3 * 1.9 else "centre"
    return "centre" if row == column == "centre" else f"{row} {column}"


@pytest.mark.parametrize(("frames", "size"), GEOMETRIES)
def test_answers_are_true(frames: int, size: int) -> None:
    for i, scene in enumerate(scenes(frames, size)):
        for turn in chat(scene, np.random.default_rng(i), 12):
            styles = ("full", "shape", "colour")
            named = [
                t
                for t in scene.things
                if any(
                    f"the {name(t, s)} " in turn.question.replace("?", " ").replace(",", " ")
                    for s in styles
                )
            ]
            if turn.category in ("colour", "shape", "direction", "location", "half"):
                (thing,) = named
            if turn.category == "code":
                assert turn.answer == scene.plate.code
            elif turn.category == "count":
                assert turn.answer == {2: "two", 3: "three", 4: "four"}[len(scene.things)]
            elif turn.category == "colour":
                assert turn.answer == thing.colour
            elif turn.category == "shape":
                assert turn.answer == thing.shape
            elif turn.category == "direction":
                dx, dy = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}[
                    turn.answer
                ]
                assert thing.dx * dx > 0 or thing.dy * dy > 0
            elif turn.category == "location":
                assert thing.dx == thing.dy == 0
                assert turn.answer == centre_region(thing, size)
            elif turn.category == "half":
                lives = range(frames // 2) if turn.answer == "first" else range(frames // 2, frames)
                assert set(range(thing.start, thing.stop)) <= set(lives)
            else:
                one, two = sorted(named, key=lambda t: t.start)
                assert two.start - one.start >= 2
                assert turn.answer in (one.shape, one.colour, f"{one.colour} {one.shape}")


@pytest.mark.parametrize(("frames", "size"), GEOMETRIES)
def test_samples_are_balanced_and_answerable(frames: int, size: int) -> None:
    kinds = categories(frames)
    drawn = list(samples(4 * len(kinds), 7, frames, size))
    assert set(Counter(turns[0].category for _, turns in drawn).values()) == {4}
    assert {len(turns) for _, turns in drawn} == {1, 2}
    for _, turns in drawn:
        assert len({t.category for t in turns}) == len(turns)


def test_categories_that_need_time_are_left_to_video() -> None:
    assert categories(20) == CATEGORIES
    assert categories(1) == IMAGE_CATEGORIES
    assert set(CATEGORIES) - set(categories(2)) == {"order", "half"}


def test_no_answer_dominates() -> None:
    turns = [t for _, pair in samples(1600, 1, 20, 280, two_turns=0) for t in pair]
    for category, most in (
        ("half", 0.62),
        ("direction", 0.36),
        ("count", 0.45),
        ("location", 0.36),
    ):
        counts = Counter(t.answer for t in turns if t.category == category)
        assert counts.most_common(1)[0][1] / counts.total() < most, counts
    assert {t.answer for t in turns if t.category == "colour"} == set(COLOURS)
    assert {t.answer for t in turns if t.category == "shape"} == set(SHAPES)


@pytest.mark.parametrize(
    ("frames", "size", "fix"),
    [(3, 280, "even"), (0, 280, "even"), (20, 100, "multiple of 28"), (20, 112, "between 168")],
)
def test_a_wrong_geometry_names_the_fix(frames: int, size: int, fix: str) -> None:
    with pytest.raises(ValueError, match=fix):
        check_geometry(frames, size)
