"""Data sets of synthetic videos, images and pages with questions, as files anyone can read."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from purekv.errors import PureKVError

from .questions import Turn, categories, conversation, possible
from .scene import LEVEL, LEVELS, TOKEN, Scene, check_geometry, make_pages, make_scene
from .sound_questions import SOUND_CATEGORIES, sound_conversation
from .soundtrack import RATE, SHORTEST, Soundtrack, make_soundtrack, wave

FRAMES_PER_SECOND = 2
QUANTISER = 14  # visually lossless: a codec's noise is no part of the question
# Scenes are drawn from seeds far from those that the models were trained on.
FIRST_SEED = 1_000_000
CHECKSUMS = "SHA256SUMS.json"
_OURS = re.compile(r"data\.jsonl|videos/[^/]+\.mp4|images/[^/]+\.png")
MEDIA = ("video", "videos", "image", "images", "page")
_SOUND_FRAME = 4096  # samples that ALAC packs together
MAX_COUNT = 16  # videos, images or pages of one prompt

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Geometry:
    """What a prompt holds: `count` videos of `frames` x `size` x `size` pixels, images or pages."""

    media: str
    frames: int
    size: int
    count: int = 1

    def __post_init__(self) -> None:
        if self.media not in MEDIA:
            raise PureKVError(f"media={self.media!r}: use one of {', '.join(MEDIA)}")
        is_video = self.media.startswith("video")
        if is_video and self.frames == 1:
            raise PureKVError("frames=1: a video has an even number of them; or use media='image'")
        if not is_video and self.frames != 1:
            raise PureKVError(f"frames={self.frames}: use 1 for media={self.media!r}")
        if not 1 <= self.count <= MAX_COUNT:
            raise PureKVError(f"count={self.count}: use 1 to {MAX_COUNT}")
        check_geometry(self.frames, self.size, page=self.media == "page")

    @property
    def grid(self) -> int:
        return self.size // TOKEN

    @property
    def patches(self) -> int:
        return max(self.frames // 2, 1)

    @property
    def visual(self) -> int:
        """Visual tokens of the prompt."""
        return self.count * self.patches * self.grid**2


def video(patches: int, grid: int, count: int = 1) -> Geometry:
    return Geometry("video" if count == 1 else "videos", 2 * patches, grid * TOKEN, count)


def image(grid: int, count: int = 1) -> Geometry:
    return Geometry("image" if count == 1 else "images", 1, grid * TOKEN, count)


def page(grid: int, count: int = 1) -> Geometry:
    return Geometry("page", 1, grid * TOKEN, count)


# By visual tokens of a prompt: its geometries, each with its share of the samples.
SUITES: dict[str, tuple[tuple[Geometry, float], ...]] = {
    "576": (
        (video(9, 8), 0.5), (video(16, 6), 0.2), (page(24), 0.1), (image(12, 4), 0.1),
        (video(8, 6, 2), 0.1),
    ),
    "1k": (
        (video(10, 10), 0.4), (video(16, 8), 0.2), (video(7, 12), 0.1), (page(32), 0.1),
        (image(16, 4), 0.1), (video(8, 8, 2), 0.1),
    ),
    "2k": (
        (video(20, 10), 0.4), (video(32, 8), 0.2), (video(14, 12), 0.1), (page(32, 2), 0.1),
        (image(16, 8), 0.1), (video(10, 10, 2), 0.1),
    ),
    "4k": (
        (video(40, 10), 0.3), (video(64, 8), 0.2), (video(16, 16), 0.2), (page(32, 4), 0.1),
        (image(16, 16), 0.1), (video(20, 10, 2), 0.1),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Drawn:
    """One sample: what is in each of its videos or images, and what is asked."""

    geometry: Geometry
    scenes: tuple[Scene, ...]
    turns: list[Turn]
    soundtrack: Soundtrack | None = None


def draw(seed: int, index: int, geometry: Geometry, level: str = LEVEL) -> tuple[Scene, ...]:
    """The scenes of prompt `index`."""
    if geometry.media == "page":
        return make_pages(seed, index, geometry.count, geometry.size, level)
    count, frames, size = geometry.count, geometry.frames, geometry.size
    return tuple(make_scene(seed, index * MAX_COUNT + k, frames, size, level) for k in range(count))


def samples(
    n: int,
    seed: int,
    geometry: Geometry,
    level: str = LEVEL,
    turns: Sequence[float] = (0.5, 0.3, 0.2),
    choices: float = 0.1,
    audio: bool = False,
) -> Iterator[Drawn]:
    """`n` samples; first questions go round the categories in turn.

    turns: shares of the samples with one, two and three questions, each of another category.
    choices: share of the questions that are multiple choice.
    audio: videos have a soundtrack, which all questions need.
    """
    asked_of = SOUND_CATEGORIES if audio else categories(geometry.media, geometry.frames)
    kinds = [kind for kind in asked_of if possible(kind, geometry.frames, level)]
    shares = np.cumsum(turns) / np.sum(turns)
    key = FIRST_SEED + seed
    index = 0
    for done in range(n):
        while True:  # a scene in which the questions can be asked
            rng = np.random.default_rng([key, index, 1])
            scenes = draw(key, index, geometry, level)
            index += 1
            many = 1 + int(np.searchsorted(shares, rng.random(), side="right"))
            others = [kind for kind in kinds if kind != kinds[done % len(kinds)]]
            later = [others[i] for i in rng.permutation(len(others))[: many - 1]]
            wanted = [kinds[done % len(kinds)], *later]
            if geometry.media == "page":
                wanted = ["page"] * many
            track = make_soundtrack(key, index, scenes[0], level) if audio else None
            asked = (
                sound_conversation(scenes[0], track, rng, wanted, choices)
                if track
                else conversation(scenes, rng, wanted, level, choices)
            )
            if asked is not None:
                yield Drawn(geometry, scenes, asked, track)
                break


def suite(
    name: str,
    n: int,
    seed: int,
    level: str = LEVEL,
    turns: Sequence[float] = (0.5, 0.3, 0.2),
    choices: float = 0.1,
    audio: bool = False,
) -> Iterator[Drawn]:
    """`n` samples over the geometries of `SUITES[name]`; with audio, over those of one video."""
    parts = [part for part in SUITES[name] if not audio or part[0].media == "video"]
    total = sum(share for _, share in parts)
    bounds = [
        round(n * sum(share for _, share in parts[:k]) / total) for k in range(len(parts) + 1)
    ]
    for k, (geometry, _) in enumerate(parts):
        many = bounds[k + 1] - bounds[k]
        yield from samples(many, seed + k, geometry, level, turns, choices, audio)


def write_dataset(
    directory: str | Path,
    n: int = 100,
    seed: int = 0,
    tokens: str = "1k",
    geometry: Geometry | None = None,
    level: str = LEVEL,
    turns: Sequence[float] = (0.5, 0.3, 0.2),
    choices: float = 0.1,
    progress: Progress | None = None,
    audio: bool = False,
) -> Path:
    """Writes `n` samples below `directory` and returns the path of its `data.jsonl`.

    The same arguments give the same bytes. A directory that already holds them, each file with
    the checksum that was noted, is left as it is; a data set made with other arguments is replaced
    once all is drawn, and other files stay. So do files of a data set that were changed since: then
    nothing is written. What a killed run left half drawn goes.

    tokens: name of one of `SUITES`, about that many visual tokens a prompt.
    geometry: of all samples, instead of a suite's.
    level: name of one of `LEVELS`.
    turns, choices, audio: see `samples`.

    Raises:
        PureKVError: an argument is out of range, or files of others or changed ones are in the way.
    """
    if n < 1:
        raise PureKVError(f"n={n}: use at least 1")
    if seed < 0:
        raise PureKVError(f"seed={seed}: use 0 or more")
    if level not in LEVELS:
        raise PureKVError(f"level={level!r}: use one of {', '.join(LEVELS)}")
    if geometry is None and tokens not in SUITES:
        raise PureKVError(f"tokens={tokens!r}: use one of {', '.join(SUITES)}")
    if audio and geometry is not None:
        _check_sound(geometry)
    directory = Path(directory)
    made: dict[str, object] = {
        "n": n, "seed": seed, "tokens": None if geometry else tokens, "geometry": repr(geometry),
        "level": level, "turns": list(turns), "choices": choices, "recipe": 4,
    }  # fmt: skip
    if audio:
        made["audio"] = True
    if is_complete(directory, made):
        _remove_half_drawn(directory)
        return directory / "data.jsonl"
    _refuse_other_files(directory, seed)
    drawn = (
        samples(n, seed, geometry, level, turns, choices, audio)
        if geometry
        else suite(tokens, n, seed, level, turns, choices, audio)
    )
    from .render import Renderer, pack  # imports torch

    renderer = Renderer()
    directory.mkdir(parents=True, exist_ok=True)
    # What is half drawn is never among the files that data.jsonl names.
    with tempfile.TemporaryDirectory(prefix=_drawing(os.getpid()), dir=directory) as folder:
        scratch = Path(folder)
        lines = []
        for number, sample in enumerate(drawn):
            pixels = renderer(pack(sample.scenes)).permute(0, 1, 3, 4, 2).numpy()
            line = _write_sample(scratch, f"{seed}-{number:05d}", sample, pixels)
            lines.append(json.dumps(line) + "\n")
            if progress:
                progress(number + 1, n)
        (scratch / "data.jsonl").write_text("".join(lines))
        _replace(directory, scratch, made)
    _remove_half_drawn(directory)
    return directory / "data.jsonl"


def _check_sound(geometry: Geometry) -> None:
    if geometry.media != "video" or geometry.frames < 2 * SHORTEST:
        raise PureKVError(
            f"sound is of one video of {2 * SHORTEST} frames or more, not of {geometry.count} "
            f"{geometry.media} of {geometry.frames}"
        )


def _write_sample(
    directory: Path, stem: str, sample: Drawn, pixels: np.ndarray
) -> dict[str, object]:
    """Writes its files, from uint8 [count, F, H, W, 3], and returns its line of `data.jsonl`."""
    is_video = sample.geometry.media.startswith("video")
    folder, suffix = ("videos", "mp4") if is_video else ("images", "png")
    (directory / folder).mkdir(exist_ok=True)
    names = []
    for k, one in enumerate(pixels):
        part = f"-{k}" if len(pixels) > 1 else ""
        names.append(f"{folder}/{stem}{part}.{suffix}")
        if is_video:
            sound = None if sample.soundtrack is None else wave(sample.soundtrack)
            write_video(directory / names[-1], one, wave=sound)
        else:
            write_image(directory / names[-1], one)
    asked: list[dict[str, object]] = []
    for turn in sample.turns:
        asked.append({"question": turn.question, "answer": turn.answer, "category": turn.category})
        if turn.choices:
            asked[-1]["choices"] = list(turn.choices)
    return {
        "id": stem,
        **({folder: names} if len(names) > 1 else {folder[:-1]: names[0]}),
        "turns": asked,
        "category": sample.turns[0].category,
        "visual_tokens": sample.geometry.visual,
    }


def _replace(directory: Path, drawn: Path, made: dict[str, object]) -> None:
    """Moves what is below `drawn` to `directory`, in place of the data set that was there.

    Stopped half-way, the directory has no `data.jsonl`, and its checksums name all that is ours.
    """
    names = sorted(str(path.relative_to(drawn)) for path in drawn.rglob("*") if path.is_file())
    sums = {name: _sha256(drawn / name) for name in names}
    (drawn / CHECKSUMS).write_text(json.dumps({"made": made, "files": sums}, indent=1) + "\n")
    for name in sorted(_ours(directory)):  # data.jsonl first
        (directory / name).unlink(missing_ok=True)
    (drawn / CHECKSUMS).replace(directory / CHECKSUMS)
    for folder in ("videos", "images"):
        if (drawn / folder).is_dir():
            (directory / folder).mkdir(exist_ok=True)
        elif (directory / folder).is_dir() and not any((directory / folder).iterdir()):
            (directory / folder).rmdir()
    for name in reversed(names):  # data.jsonl last
        (drawn / name).replace(directory / name)


def _ours(directory: Path) -> dict[str, object]:
    """The files that an earlier `write_dataset` noted there, and their checksums."""
    try:
        files = json.loads((directory / CHECKSUMS).read_text())["files"]
        return {name: files[name] for name in files if _OURS.fullmatch(name)}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _drawing(process: int | str) -> str:
    """How the folder begins in which a process of this machine draws."""
    host = re.sub(r"\W", "", platform.node())
    return f".drawing-{host}-{process}-"


def _remove_half_drawn(directory: Path) -> None:
    """What processes left there that run no more."""
    name = re.compile(re.escape(_drawing("PROCESS")).replace("PROCESS", r"(\d+)") + r"\w+")
    for path in directory.glob(".drawing-*"):
        found = name.fullmatch(path.name)
        if found and path.is_dir() and not path.is_symlink() and not _runs(int(found[1])):
            shutil.rmtree(path, ignore_errors=True)


def _runs(process: int) -> bool:
    """Whether it does, or may."""
    if sys.platform == "win32":  # where asking would end it
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        pass
    return True


def _refuse_other_files(directory: Path, seed: int) -> None:
    """`write_dataset` replaces its own files, nothing else."""
    if directory.exists() and not directory.is_dir():
        raise PureKVError(f"{directory} is a file; name a new directory")
    for folder in (directory / "videos", directory / "images"):
        if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
            kind = "link" if folder.is_symlink() else "file"
            raise PureKVError(f"{folder} is a {kind}, not a folder; name a new directory")
    ours = _ours(directory)
    names = {"data.jsonl"} | ({CHECKSUMS} if not ours else set())
    names |= {
        f"{folder}/{path.name}"
        for folder in ("videos", "images")
        for path in (directory / folder).glob(f"{seed}-*")
    }
    if others := sorted(name for name in names - set(ours) if (directory / name).exists()):
        raise PureKVError(f"{directory} holds a {others[0]} of its own; name a new directory")
    for name, noted in sorted(ours.items()):
        path = directory / name
        if path.exists() and not (path.is_file() and _sha256(path) == noted):
            raise PureKVError(
                f"{path} was changed since it was written; move it away or delete it, or name a "
                "new directory"
            )


def is_complete(directory: Path, made: dict[str, object] | None = None) -> bool:
    """Whether every file that was written there has its checksum (and was made like this)."""
    try:
        noted = json.loads((directory / CHECKSUMS).read_text())
        if made is not None and noted["made"] != made:
            return False
        return all(_sha256(directory / name) == sha for name, sha in noted["files"].items())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def write_image(path: Path, pixels: np.ndarray) -> None:
    """pixels: uint8 [1, H, W, 3]."""
    from PIL import Image

    Image.fromarray(pixels[0]).save(path, format="PNG")


def write_video(
    path: Path,
    pixels: np.ndarray,
    rate: int = FRAMES_PER_SECOND,
    quantiser: int = QUANTISER,
    wave: np.ndarray | None = None,
) -> None:
    """pixels: uint8 [F, H, W, 3]; wave: int16 [samples] at `soundtrack.RATE`, kept as it is (ALAC).

    One thread, a constant quantiser, no B frames and colour conversion of our own, so that the
    bytes repeat: x264's rate control works in floating point and its other habits depend on time.
    """
    import av

    from .colour import rgb_to_planes

    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=rate)
        stream.height, stream.width = pixels.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.options = {
            "qp": str(quantiser), "preset": "medium", "threads": "1",
            "x264-params": "bframes=0:mbtree=0:weightp=0:scenecut=0",
        }  # fmt: skip
        sound = None if wave is None else container.add_stream("alac", rate=RATE, layout="mono")
        for planes in rgb_to_planes(pixels):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(planes, format="yuv420p")))
        container.mux(stream.encode())
        if wave is not None and sound is not None:
            for start in range(0, len(wave), _SOUND_FRAME):
                part = av.AudioFrame.from_ndarray(
                    wave[None, start : start + _SOUND_FRAME], format="s16p", layout="mono"
                )
                part.sample_rate, part.pts = RATE, start
                container.mux(sound.encode(part))
            container.mux(sound.encode())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
