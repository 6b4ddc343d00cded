"""Questions about a scene and their one right answer, in fixed words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .scene import Scene, Thing, order_gap

CATEGORIES = ("code", "colour", "shape", "direction", "location", "order", "count", "half")
IMAGE_CATEGORIES = ("code", "colour", "shape", "location", "count")
NUMBERS = ("zero", "one", "two", "three", "four")


@dataclass(frozen=True)
class Turn:
    category: str
    question: str
    answer: str


def categories(frames: int) -> tuple[str, ...]:
    """The categories that a clip of so many frames can be asked about."""
    if frames == 1:
        return IMAGE_CATEGORIES
    return CATEGORIES if frames >= 4 else (*IMAGE_CATEGORIES, "direction")


def ask(scene: Scene, category: str, rng: np.random.Generator, style: str = "shape") -> Turn | None:
    """One question; `style` names a thing by "shape", "colour" or "full". None if none fits."""
    if category == "code":
        return Turn(category, "What does the sign say?", scene.plate.code)
    if category == "count":
        return Turn(category, "How many objects appear?", NUMBERS[len(scene.things)])
    if category == "order":
        return _order(scene, rng, style)
    fits = [
        (thing, answer) for thing in scene.things if (answer := _answer(scene, thing, category))
    ]
    if not fits:
        return None
    thing, answer = fits[int(rng.integers(len(fits)))]
    if category == "colour":
        question = f"What colour is the {thing.shape}?"
    elif category == "shape":
        question = f"What shape is the {thing.colour} object?"
    elif category == "direction":
        question = f"Which way does the {name(thing, style)} move?"
    elif category == "location":
        question = f"Where is the {name(thing, style)}?"
    else:
        question = f"Does the {name(thing, style)} appear in the first or the second half?"
    return Turn(category, question, answer)


def name(thing: Thing, style: str) -> str:
    if style == "full":
        return f"{thing.colour} {thing.shape}"
    return thing.shape if style == "shape" else f"{thing.colour} object"


def _answer(scene: Scene, thing: Thing, category: str) -> str | None:
    match category:
        case "colour":
            return thing.colour
        case "shape":
            return thing.shape
        case "direction":
            return thing.direction
        case "location":
            return scene.region(thing)
        case "half":
            return scene.half(thing)
    raise ValueError(f"unknown category {category!r}; one of {', '.join(CATEGORIES)}")


def _order(scene: Scene, rng: np.random.Generator, style: str) -> Turn | None:
    gap = 2 * order_gap(max(scene.frames // 2, 1))
    pairs = [(a, b) for a in scene.things for b in scene.things if b.start - a.start >= gap]
    if not pairs:
        return None
    first, second = pairs[int(rng.integers(len(pairs)))]
    one, two = (first, second) if rng.random() < 0.5 else (second, first)
    question = f"Which appears first, the {name(one, style)} or the {name(two, style)}?"
    return Turn("order", question, name(first, style).removesuffix(" object"))


def chat(scene: Scene, rng: np.random.Generator, turns: int) -> list[Turn]:
    """A training chat: every category once in random order, then more, no answer given away.

    A thing that is named by shape and colour together comes after the questions for those.
    """
    style = ("shape", "colour", "full")[int(rng.integers(3))]
    kinds = categories(scene.frames)
    wanted = [kinds[i] for i in rng.permutation(len(kinds))]
    again = [c for c in kinds if c not in ("code", "count")]
    while len(wanted) < turns:
        wanted.append(again[int(rng.integers(len(again)))])
    chosen: list[Turn] = []
    described: set[str] = set()  # things whose shape-colour pair an answer has told
    for category in wanted:
        turn = ask(scene, category, rng, style)
        if turn is None or any(turn.question == other.question for other in chosen):
            continue
        if category in ("colour", "shape"):
            thing = next(t for t in scene.things if _about(turn, t))
            if thing.shape in described:
                continue
            described.add(thing.shape)
        chosen.append(turn)
    if style == "full":
        chosen.sort(key=lambda turn: turn.category not in ("colour", "shape", "code", "count"))
    return chosen


def _about(turn: Turn, thing: Thing) -> bool:
    return (
        (thing.shape in turn.question)
        if turn.category == "colour"
        else (thing.colour in turn.question)
    )


def conversation(
    scene: Scene, rng: np.random.Generator, wanted: Sequence[str], style: str | None = None
) -> list[Turn] | None:
    """One turn for each wanted category, or None if the scene cannot be asked one of them."""
    styles = ("shape", "colour", "full")
    turns = [ask(scene, c, rng, style or styles[int(rng.integers(3))]) for c in wanted]
    return None if any(turn is None for turn in turns) else [t for t in turns if t is not None]
