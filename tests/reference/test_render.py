"""Pixels: the same from any batch, what the scene says, and equal on CPU and GPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from purekv.reference.data import Geometry, draw, image, page, video
from purekv.reference.render import Renderer, pack
from purekv.reference.scene import (
    BACKGROUNDS,
    COLOURS,
    GLYPHS,
    LEVELS,
    MARGIN,
    PALETTES,
    TOKEN,
    Background,
    Camera,
    Scene,
    Text,
    make_scene,
)

GEOMETRIES = [video(4, 7), image(10, 2), page(12), page(32)]
each_geometry = pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
each_level = pytest.mark.parametrize("level", LEVELS)


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    return Renderer()


def lit(colour: tuple[int, int, int], scene: Scene, frame: int) -> torch.Tensor:
    """A colour in the light of one frame, [3, 1, 1]."""
    first, last = scene.camera.gain
    gain = first + (last - first) * frame // max(1, scene.frames - 1)
    return (torch.tensor(colour) * gain // 256).clamp(max=255)[:, None, None]


def jump(scene: Scene, frame: int, role: str = "") -> tuple[int, int]:
    still = not scene.camera.shake or role in ("clock", "page")
    return (0, 0) if still else scene.camera.shake[frame // 2]


def texts(scene: Scene) -> Iterator[tuple[Text, int, str]]:
    """Each text in each patch, with what it says there."""
    for text in scene.texts:
        for frame in range(text.start, text.stop, 2):
            state = (frame - text.start) // 2
            yield text, frame, text.states[state if len(text.states) > 1 else 0]


@each_level
def test_a_batch_is_its_scenes(renderer: Renderer, level: str) -> None:
    scenes = [make_scene(0, i, 8, 168, level, kind) for i, kind in enumerate(BACKGROUNDS)]
    together, owners = renderer.render(pack(scenes))
    assert together.shape == (len(BACKGROUNDS), 8, 168, 168, 3)
    assert together.dtype == torch.uint8
    assert renderer(pack(scenes)).shape == (len(BACKGROUNDS), 8, 3, 168, 168)
    for b, scene in enumerate(scenes):
        alone, own = renderer.render(pack([scene]))
        torch.testing.assert_close(alone[0], together[b], atol=0, rtol=0)
        for name in ("thing", "left", "right"):
            assert torch.equal(getattr(own, name)[0], getattr(owners, name)[b])


def test_pages_of_a_batch_are_each_alone(renderer: Renderer) -> None:
    scenes = [scene for level in LEVELS for scene in draw(1, 0, page(12, 2), level)]
    together = renderer(pack(scenes))
    for scene, frames in zip(scenes, together, strict=True):
        torch.testing.assert_close(renderer(pack([scene]))[0], frames, atol=0, rtol=0)


@each_level
@pytest.mark.parametrize("kind", BACKGROUNDS)
def test_things_have_their_colour_where_the_scene_says(
    renderer: Renderer, kind: str, level: str
) -> None:
    for index in range(3):
        scene = make_scene(1, index, 8, 196, level, kind)
        image = renderer(pack([scene]))[0]
        for thing in scene.things:
            for frame in (thing.start, thing.stop - 1):
                age, (jump_x, jump_y) = frame - thing.start, jump(scene, frame)
                x, y = thing.x + thing.dx * age + jump_x, thing.y + thing.dy * age + jump_y
                box = image[frame, :, y : y + thing.size, x : x + thing.size]
                fill = (box == lit(COLOURS[thing.colour], scene, frame)).all(0)
                assert fill.float().mean() > 0.15
                # It fills its box: some of it lies in each quarter.
                half = thing.size // 2
                for rows in (fill[:half], fill[half:]):
                    assert rows[:, :half].any()
                    assert rows[:, half:].any()


@each_level
@each_geometry
def test_nothing_is_drawn_outside_of_what_the_scene_says(
    renderer: Renderer, geometry: Geometry, level: str
) -> None:
    """Frames differ from the background alone just where a thing or a text is."""
    for index in range(3):
        for scene in draw(1, index, geometry, level):
            bare = replace(scene, things=(), texts=())
            differs = (renderer(pack([scene]))[0] != renderer(pack([bare]))[0]).any(1)
            for frame in range(scene.frames):
                allowed = torch.zeros(scene.size, scene.size, dtype=torch.bool)
                for thing in scene.things:
                    if thing.start <= frame < thing.stop:
                        age, (x, y) = frame - thing.start, jump(scene, frame)
                        x, y = x + thing.x + thing.dx * age, y + thing.y + thing.dy * age
                        allowed[y : y + thing.size, x : x + thing.size] = True
                for text in scene.texts:
                    if text.start <= frame < text.stop:
                        x, y = jump(scene, frame, text.role)
                        left, top, right, bottom = text.box()
                        allowed[top + y : bottom + y, left + x : right + x] = True
                assert not (differs[frame] & ~allowed).any()


def read(cell: torch.Tensor, renderer: Renderer, ink: torch.Tensor, plate: torch.Tensor) -> str:
    """The glyph that a cell, [3, h, w], shows most likely; a blank is a space."""
    span = (ink - plate).float()
    drawn = ((cell - plate).float() * span).sum(0) / span.square().sum()
    if drawn.max() < 0.5:
        return " "
    glyphs = torch.nn.functional.interpolate(
        renderer.glyphs[:, None].float(), drawn.shape, mode="area"
    )[:, 0]
    return GLYPHS[int((glyphs - drawn).square().sum((1, 2)).argmin())]


@each_level
@each_geometry
def test_texts_can_be_read_from_the_pixels(
    renderer: Renderer, geometry: Geometry, level: str
) -> None:
    """Every character of every sign, clock, board and page, in every patch."""
    wrong = total = 0
    for index in range(3):
        for scene in draw(2, index, geometry, level):
            image = renderer(pack([scene]))[0].int()
            for text, frame, says in texts(scene):
                plate, ink = (lit(c, scene, frame) for c in PALETTES[text.colour])
                jump_x, jump_y = jump(scene, frame, text.role)
                found = []
                for row, line in enumerate(says.split("\n")):
                    y = text.y + MARGIN + row * text.height + jump_y
                    wide, high = text.width - 1, (text.width - 1) * 7 // 6
                    for column in range(len(line)):
                        x = text.x + MARGIN + column * text.width + jump_x
                        cell = image[frame, :, y : y + high, x : x + wide]
                        found.append(read(cell, renderer, ink, plate))
                asked = says.replace("\n", "")
                wrong += sum(a != b for a, b in zip(asked, found, strict=True))
                total += len(asked)
                # The margin is plain plate.
                left, top, right, _ = text.box()
                edge = image[frame, :, top + jump_y, left + jump_x : right + jump_x]
                assert (edge == plate[:, 0]).all()
    assert total > 20
    assert wrong <= 0.02 * total


@each_level
@each_geometry
def test_owners_hold_every_character_where_it_is(
    renderer: Renderer, geometry: Geometry, level: str
) -> None:
    """Each patch's tokens, in reading order, spell what the texts say."""
    for index in range(6):
        scenes = draw(2, index, geometry, level)
        packed = pack(scenes)
        owners = renderer.render(packed)[1]
        roles = [texts.role for texts in packed.texts]
        for b, scene in enumerate(scenes):
            for text, frame, says in texts(scene):
                rank = scene.of_role(text.role).index(text)
                number = roles.index(text.role) + rank + 1
                patch = frame // 2
                own = owners.text[b, patch] == number
                spelt = []
                for row in range(own.shape[0]):
                    for column in own[row].nonzero().flatten().tolist():
                        for side in (owners.left, owners.right):
                            if glyph := int(side[b, patch, row, column]):
                                spelt.append((row, column, GLYPHS[glyph - 1]))
                jump_x, jump_y = jump(scene, frame, text.role)
                expected = []
                for line, words in enumerate(says.split("\n")):
                    for k, character in enumerate(words):
                        if character != " ":
                            x = text.x + MARGIN + k * text.width + text.width // 2 + jump_x
                            y = text.y + MARGIN + line * text.height + text.width // 2 + jump_y
                            expected.append((y // TOKEN, x // TOKEN, character))
                assert spelt == sorted(expected, key=lambda e: e[:2])


@each_level
def test_owners_name_the_thing_that_fills_a_token(renderer: Renderer, level: str) -> None:
    owned = total = 0
    for index in range(30):
        scene = make_scene(2, index, 8, 196, level)
        owner = renderer.render(pack([scene]))[1].thing[0]
        for k, thing in enumerate(scene.things):
            shown = (owner == k + 1).nonzero()
            total += 1
            owned += len(shown) > 0  # a small one on a corner of four tokens fills none
            assert set((2 * shown[:, 0]).tolist()) <= set(range(thing.start, thing.stop))
            for patch, row, column in shown.tolist():
                x, y = jump(scene, 2 * patch)
                left, top, right, bottom = thing.box()
                assert left + x - TOKEN < column * TOKEN < right + x
                assert top + y - TOKEN < row * TOKEN < bottom + y
    assert owned >= 0.97 * total


@pytest.mark.parametrize("kind", ["footage", "palms", "waves", "noise"])
def test_backgrounds_move_and_photographs_follow_the_camera(renderer: Renderer, kind: str) -> None:
    scene = make_scene(4, 1, 8, 168, kind=kind)
    scene = replace(scene, things=(), texts=(), camera=Camera(pan=(3, 2)))
    frames = renderer(pack([scene]))[0]
    assert (frames[0] != frames[-1]).any()
    still = replace(scene, background=Background("photo", scene.background.params), camera=Camera())
    frames = renderer(pack([still]))[0]
    assert (frames == frames[:1]).all()


def test_things_stand_out_from_every_background(renderer: Renderer) -> None:
    """No background has the colour of a thing over much of a frame."""
    for kind in BACKGROUNDS:
        scenes = [
            replace(make_scene(6, i, 2, 168, kind=kind), things=(), texts=(), camera=Camera())
            for i in range(8)
        ]
        frames = renderer(pack(scenes)).int()
        for colour in COLOURS.values():
            near = (frames - torch.tensor(colour)[:, None, None]).abs().amax(2) < 12
            assert near.float().mean() < 0.05


def test_an_image_is_one_frame(renderer: Renderer) -> None:
    assert renderer(pack(draw(0, 0, image(10, 3)))).shape == (3, 1, 3, 280, 280)
    assert renderer(pack(draw(0, 0, page(32, 2)))).shape == (2, 1, 3, 896, 896)


def test_brightness_goes_from_the_first_to_the_last(renderer: Renderer) -> None:
    scene = make_scene(4, 1, 8, 168, kind="plain")
    scene = replace(scene, things=(), texts=(), camera=Camera(gain=(200, 270)))
    means = renderer(pack([scene]))[0].float().mean((1, 2, 3)).numpy()
    assert np.all(np.diff(means) > 0)
    assert means[-1] / means[0] == pytest.approx(270 / 200, rel=0.03)


@pytest.mark.gpu
@pytest.mark.parametrize("geometry", [video(10, 10), image(16, 2), page(32)], ids=str)
@each_level
def test_the_gpu_draws_the_same_pixels(renderer: Renderer, geometry: Geometry, level: str) -> None:
    scenes = [scene for i in range(8) for scene in draw(5, i, geometry, level)]
    if geometry.media == "video":
        scenes += [make_scene(5, i, 20, 280, level, kind) for i, kind in enumerate(BACKGROUNDS)]
    (drawn, owners), (expected, own) = (
        r.render(pack(scenes)) for r in (Renderer("cuda"), renderer)
    )
    torch.testing.assert_close(expected, drawn.cpu(), atol=0, rtol=0)
    for name in ("thing", "text", "left", "right"):
        assert torch.equal(getattr(owners, name).cpu(), getattr(own, name))
