"""Pixels: the same from any batch, what the scene says, and equal on CPU and GPU."""

from __future__ import annotations

import pytest
import torch

from purekv.reference.render import Renderer, pack
from purekv.reference.scene import BACKGROUNDS, COLOURS, make_scene


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    return Renderer()


def test_a_batch_is_its_scenes(renderer: Renderer) -> None:
    scenes = [make_scene(0, i, 4, 168, kind) for i, kind in enumerate(BACKGROUNDS)]
    together = renderer(pack(scenes))
    assert together.shape == (4, 4, 3, 168, 168)
    assert together.dtype == torch.uint8
    for scene, frames in zip(scenes, together, strict=True):
        torch.testing.assert_close(renderer(pack([scene]))[0], frames, atol=0, rtol=0)


@pytest.mark.parametrize("kind", BACKGROUNDS)
def test_things_have_their_colour_where_the_scene_says(renderer: Renderer, kind: str) -> None:
    for index in range(4):
        scene = make_scene(1, index, 8, 196, kind)
        image = renderer(pack([scene]))[0]
        for thing in scene.things:
            colour = torch.tensor(COLOURS[thing.colour], dtype=torch.uint8)[:, None, None]
            for frame in (thing.start, thing.stop - 1):
                age = frame - thing.start
                x, y = thing.x + thing.dx * age, thing.y + thing.dy * age
                box = image[frame, :, y : y + thing.size, x : x + thing.size]
                assert (box == colour).all(0).float().mean() > 0.15


def test_owners_name_the_glyphs_in_reading_order(renderer: Renderer) -> None:
    for index in range(6):
        scene = make_scene(2, index, 8, 196)
        owner = renderer.render(pack([scene]))[1][0]
        for patch in range(scene.plate.start // 2, scene.plate.stop // 2):
            where = [(owner[patch] == 5 + k).nonzero() for k in range(4)]
            assert all(len(w) == 1 for w in where)
            columns = [int(w[0, 1]) for w in where]
            assert columns == sorted(set(columns))


def test_an_image_is_one_frame(renderer: Renderer) -> None:
    assert renderer(pack([make_scene(0, 0, 1, 280)])).shape == (1, 1, 3, 280, 280)


@pytest.mark.gpu
def test_the_gpu_draws_the_same_pixels(renderer: Renderer) -> None:
    scenes = [make_scene(5, i, 8, 280, kind) for i, kind in enumerate(BACKGROUNDS * 4)]
    drawn = Renderer("cuda")(pack(scenes)).cpu()
    torch.testing.assert_close(renderer(pack(scenes)), drawn, atol=0, rtol=0)
