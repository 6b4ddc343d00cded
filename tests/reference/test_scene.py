"""Scenes: decided by the seed, whole, and free of overlaps in every frame."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest

from purekv.reference.data import SUITES, Geometry, draw, image, page, video
from purekv.reference.scene import (
    LEVELS,
    MARGIN,
    TOKEN,
    Scene,
    Text,
    Thing,
    check_geometry,
    make_scene,
)

SHORT = [video(1, 7), video(2, 6), video(3, 9), image(6), image(16, 3), page(6), page(10, 16)]
GEOMETRIES = [
    *dict.fromkeys(geometry for suite in SUITES.values() for geometry, _ in suite), *SHORT
]  # fmt: skip
ENTRY = re.compile(r"[A-Z]\d [A-Z]\d[A-Z]\d")

each_geometry = pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
each_level = pytest.mark.parametrize("level", LEVELS)


def scenes(geometry: Geometry, level: str, n: int = 24) -> list[Scene]:
    prompts = max(2, n // geometry.count)
    return [scene for i in range(prompts) for scene in draw(3, i, geometry, level)]


def parts_of(scene: Scene) -> list[Thing | Text]:
    return [*scene.things, *scene.texts]


def box(scene: Scene, part: Thing | Text, frame: int) -> tuple[int, int, int, int]:
    """Where a part is in one frame, found anew, the camera's jump included."""
    if isinstance(part, Thing):
        age = frame - part.start
        left, top = part.x + part.dx * age, part.y + part.dy * age
        right, bottom = left + part.size, top + part.size
    else:
        lines = part.states[0].split("\n")
        left, top = part.x, part.y
        right = left + 2 * MARGIN + part.width * max(map(len, lines))
        bottom = top + 2 * MARGIN + part.height * len(lines)
    x = y = 0
    if scene.camera.shake and not (isinstance(part, Text) and part.role in ("clock", "page")):
        x, y = scene.camera.shake[frame // 2]
    return left + x, top + y, right + x, bottom + y


@each_level
@each_geometry
def test_a_scene_is_decided_by_its_seed(geometry: Geometry, level: str) -> None:
    for index in range(2):
        assert draw(3, index, geometry, level) == draw(3, index, geometry, level)
        assert draw(3, index, geometry, level) != draw(4, index, geometry, level)
    drawn = scenes(geometry, level)
    assert len(set(drawn)) == len(drawn)  # no scene comes twice, within a prompt or without


@each_level
@each_geometry
def test_nothing_hides_or_leaves_the_frame(geometry: Geometry, level: str) -> None:
    for scene in scenes(geometry, level):
        assert (scene.frames, scene.size) == (geometry.frames, geometry.size)
        parts = parts_of(scene)
        for part in parts:
            assert 0 <= part.start < part.stop <= scene.frames
            assert scene.frames == 1 or part.start % 2 == part.stop % 2 == 0  # whole patches
        for frame in range(scene.frames):
            boxes = [box(scene, p, frame) for p in parts if p.start <= frame < p.stop]
            for i, a in enumerate(boxes):
                assert min(a[:2]) >= 0
                assert max(a[2:]) <= scene.size
                for b in boxes[i + 1 :]:
                    assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


@each_level
@each_geometry
def test_things_and_signs_cannot_be_confused(geometry: Geometry, level: str) -> None:
    rules = LEVELS[level]
    for scene in scenes(geometry, level):
        if geometry.media == "page":
            assert not scene.things
            continue
        count, signs = len(scene.things), scene.signs
        assert rules.things[0] <= count <= rules.things[1]
        assert len({t.shape for t in scene.things}) == count
        assert len({t.colour for t in scene.things}) == count
        assert 1 <= len(signs) <= rules.signs[1]
        assert len({sign.colour for sign in signs}) == len(signs)
        for thing in scene.things:
            assert thing.size <= rules.extent[1]
            assert thing.direction is None or max(abs(thing.dx), abs(thing.dy)) >= 4
        for text in scene.texts:
            assert text.width >= TOKEN // 2  # so that no token has three characters


@each_level
@each_geometry
def test_clock_and_board_go_through_the_whole_video(geometry: Geometry, level: str) -> None:
    for scene in scenes(geometry, level):
        clocks, boards = scene.of_role("clock"), scene.of_role("board")
        assert len(clocks) == len(boards) <= 1
        for text in clocks + boards:
            assert (text.start, text.stop) == (0, scene.frames)
            assert len(text.states) == geometry.patches
            assert all(re.fullmatch(r"\d\d", state) for state in text.states)
        if clocks:
            assert [int(time) for time in clocks[0].states] == list(range(geometry.patches))


@each_level
@pytest.mark.parametrize("geometry", [page(6), page(10, 16), page(24), page(32, 4)], ids=str)
def test_pages_hold_entries_and_no_label_twice(geometry: Geometry, level: str) -> None:
    for index in range(8):
        pages = draw(3, index, geometry, level)
        assert len(pages) == geometry.count
        labels: list[str] = []
        for scene in pages:
            (text,) = scene.texts
            found = ENTRY.findall(text.states[0])
            # Nothing else is written there, and lines are further apart than a token is high.
            assert re.sub(r"\s", "", "".join(found)) == re.sub(r"\s", "", text.states[0])
            assert scene.entries() == {entry[:2]: entry[3:] for entry in found}
            assert len(found) >= 2
            assert text.height >= TOKEN
            labels += [entry[:2] for entry in found]
        assert len(set(labels)) == len(labels)


def test_levels_are_ordered_by_difficulty() -> None:
    for easier, harder in pairwise(LEVELS.values()):
        assert easier.things < harder.things
        assert easier.character > harder.character or easier.character[1] > harder.character[1]
        assert easier.shake < harder.shake
        assert easier.drift < harder.drift
        assert easier.asked <= harder.asked
        assert easier.columns < harder.columns


def test_a_background_can_be_asked_for() -> None:
    plain = make_scene(0, 0, 8, 168, kind="plain")
    noise = make_scene(0, 0, 8, 168, kind="noise")
    assert (plain.background.kind, noise.background.kind) == ("plain", "noise")
    assert (plain.things, plain.texts) == (noise.things, noise.texts)


@pytest.mark.parametrize(
    ("frames", "size", "fix"),
    [
        (3, 280, "even"), (0, 280, "even"), (130, 280, "even number from 2 to 128"),
        (20, 100, "multiple of 28"), (20, 112, "between 168"), (20, 476, "and 448"),
    ],
)  # fmt: skip
def test_a_wrong_geometry_names_the_fix(frames: int, size: int, fix: str) -> None:
    with pytest.raises(ValueError, match=fix):
        check_geometry(frames, size)
    check_geometry(1, 896, page=True)


@pytest.mark.parametrize(
    ("wrong", "fix"),
    [
        (("film", 20, 280), "use one of video"), (("video", 1, 280), "media='image'"),
        (("image", 20, 280), "use 1"), (("page", 2, 280), "use 1"),
        (("video", 20, 280, 0), "use 1 to 16"), (("image", 1, 280, 17), "use 1 to 16"),
        (("image", 1, 896), "and 448"), (("page", 1, 924), "and 896"),
    ],
)  # fmt: skip
def test_a_wrong_prompt_names_the_fix(wrong: tuple, fix: str) -> None:
    with pytest.raises(ValueError, match=fix):
        Geometry(*wrong)


@pytest.mark.parametrize("name", SUITES)
def test_a_suite_has_about_the_tokens_of_its_name(name: str) -> None:
    target = int(name[:-1]) * 1000 if name.endswith("k") else int(name)
    assert sum(share for _, share in SUITES[name]) == pytest.approx(1)
    for geometry, _ in SUITES[name]:
        assert target <= geometry.visual <= 1.03 * target
