"""Makes the sample clip, src/purekv/reference/assets/sample.mp4, and its questions.

python training/make_sample.py [SEED]

The clip runs at 8 frames a second, and every fourth frame is a frame of an ordinary scene: sampled
at 2 frames a second it is what the model knows, watched at full rate it is a smooth video.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import numpy as np
import torch

from purekv.reference.data import write_video
from purekv.reference.questions import conversation
from purekv.reference.render import ASSETS, Renderer, pack
from purekv.reference.scene import Background, Camera, Scene, make_scene

SLOWDOWN = 4  # frames of the clip for each of the scene
FRAMES, SIZE, QUANTISER = 20, 280, 20
ASKED = ("code", "colour", "direction", "order", "count")
# Footage at full height, three of its frames for each of the scene's, a camera that stands still.
WINDOW, STRIDE = 156, 2


def make(seed: int) -> tuple[Scene, list[dict[str, str]]] | None:
    scene = make_scene(seed, 0, FRAMES, SIZE, kind="footage")
    if len(scene.things) != 4 or scene.of_role("board"):
        return None
    start, left = scene.background.params[2] % 60, scene.background.params[3] % 280
    params = (WINDOW, STRIDE, start, left, 0, 0, 0, 0)
    scene = replace(scene, background=Background("footage", params), camera=Camera())
    turns = conversation([scene], np.random.default_rng(seed), ASKED)
    if turns is None:
        return None
    return scene, [
        {"category": t.category, "question": t.question, "answer": t.answer} for t in turns
    ]


def between(scene: Scene, step: int) -> Scene:
    """The scene a part `step / SLOWDOWN` of a frame later."""
    moved = [
        replace(t, x=t.x + t.dx * step // SLOWDOWN, y=t.y + t.dy * step // SLOWDOWN)
        for t in scene.things
    ]
    params = list(scene.background.params)
    params[2] += 3 * step // SLOWDOWN
    return replace(scene, things=tuple(moved), background=Background("footage", tuple(params)))


def main(seed: int) -> None:
    while (made := make(seed)) is None:
        seed += 1
    scene, turns = made
    renderer = Renderer()
    phases = [renderer(pack([between(scene, step)]))[0] for step in range(SLOWDOWN)]
    pixels = torch.stack(phases, 1).flatten(0, 1).permute(0, 2, 3, 1).numpy()
    write_video(ASSETS / "sample.mp4", pixels, rate=2 * SLOWDOWN, quantiser=QUANTISER)
    (ASSETS / "sample.json").write_text(json.dumps({"seed": seed, "turns": turns}, indent=1) + "\n")
    print(f"seed {seed}", *turns, sep="\n")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 0)
