"""Datasets of synthetic videos (or images) with questions, as files anyone can read."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from .questions import Turn, categories, conversation
from .scene import Scene, check_geometry, make_scene

FRAMES_PER_SECOND = 2
CRF = 14  # visually lossless: a codec's noise is no part of the question
# Scenes are drawn from seeds far from those that the model was trained on.
FIRST_SEED = 1_000_000

Progress = Callable[[int, int], None]


def samples(
    n: int, seed: int, frames: int, size: int, two_turns: float = 0.5
) -> Iterator[tuple[Scene, list[Turn]]]:
    """`n` scenes with one or two questions; first questions go round the categories in turn."""
    kinds = categories(frames)
    index = 0
    for done in range(n):
        first = kinds[done % len(kinds)]
        while True:  # a scene in which the question can be asked
            key = FIRST_SEED + seed
            rng = np.random.default_rng([key, index, 1])
            scene = make_scene(key, index, frames, size)
            index += 1
            wanted = [first]
            if rng.random() < two_turns:
                others = [kind for kind in kinds if kind != first]
                wanted.append(others[int(rng.integers(len(others)))])
            turns = conversation(scene, rng, wanted)
            if turns is not None:
                yield scene, turns
                break


def write_dataset(
    directory: str | Path,
    n: int = 100,
    seed: int = 0,
    frames: int = 20,
    size: int = 280,
    two_turns: float = 0.5,
    progress: Progress | None = None,
) -> Path:
    """Writes `n` samples below `directory` and returns the path of its `data.jsonl`.

    frames: of a video, even, two a visual patch and two a second; 1 writes images.
    size: side in pixels, a multiple of 28 (one visual token).
    two_turns: share of the samples with a second question, of another category.
    The same arguments give the same bytes.
    """
    from .render import Renderer, pack

    if n < 1:
        raise ValueError(f"n={n}: use at least 1")
    if seed < 0:
        raise ValueError(f"seed={seed}: use 0 or more")
    check_geometry(frames, size)
    directory = Path(directory)
    kind, suffix = ("image", ".png") if frames == 1 else ("video", ".mp4")
    (directory / f"{kind}s").mkdir(parents=True, exist_ok=True)
    renderer = Renderer()
    lines = []
    for i, (scene, turns) in enumerate(samples(n, seed, frames, size, two_turns)):
        name = f"{kind}s/{i:05d}{suffix}"
        pixels = renderer(pack([scene]))[0].permute(0, 2, 3, 1).numpy()
        write = write_image if frames == 1 else write_video
        with _Fresh(directory / name) as scratch:
            write(scratch, pixels)
        record = {
            "id": f"{seed}-{frames}x{size}-{i:05d}",
            kind: name,
            "category": turns[0].category,
            "turns": [
                {"question": t.question, "answer": t.answer, "category": t.category} for t in turns
            ],
        }
        lines.append(json.dumps(record) + "\n")
        if progress:
            progress(i + 1, n)
    with _Fresh(directory / "data.jsonl") as scratch:
        scratch.write_text("".join(lines))
    return directory / "data.jsonl"


def write_image(path: Path, pixels: np.ndarray) -> None:
    """pixels: uint8 [1, H, W, 3]."""
    from PIL import Image

    Image.fromarray(pixels[0]).save(path, format="PNG")


def write_video(
    path: Path, pixels: np.ndarray, rate: int = FRAMES_PER_SECOND, crf: int = CRF
) -> None:
    """pixels: uint8 [F, H, W, 3].

    One thread, no B frames, no macroblock tree, so that the bytes repeat: with the preset's own
    x264 was seen to encode the same frames in several ways.
    """
    import av

    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=rate)
        stream.height, stream.width = pixels.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.options = {
            "crf": str(crf), "preset": "medium", "threads": "1", "x264-params": "bframes=0:mbtree=0"
        }  # fmt: skip
        for picture in pixels:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


class _Fresh:
    """A temporary name beside `path` that takes its place when the block ends well."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.scratch = path.with_name(f".{os.getpid()}-{path.name}")

    def __enter__(self) -> Path:
        return self.scratch

    def __exit__(self, failed: object, *rest: object) -> None:
        if failed:
            self.scratch.unlink(missing_ok=True)
        else:
            self.scratch.replace(self.path)
