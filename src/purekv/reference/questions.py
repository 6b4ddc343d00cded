"""Questions about scenes and their one right answer, in fixed words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from .scene import (
    BOARD,
    COLOURS,
    DIGITS,
    DIRECTIONS,
    LETTERS,
    LEVEL,
    LEVELS,
    REGIONS,
    SHAPES,
    Scene,
    Thing,
)

CATEGORIES = (
    "code", "colour", "shape", "direction", "location", "order", "count", "half", "state",
    "compare", "page",
)  # fmt: skip
IMAGE_CATEGORIES = ("code", "colour", "shape", "location", "count")
# How often a training chat comes back to a category: what is learnt last, most. There is one count
# a scene, so only prompts of several come back to it.
_AGAIN = {"count": 3, "compare": 3, "state": 2, "direction": 2, "half": 2, "location": 2}
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight")
ORDINALS = (
    "first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth",
    "eleventh", "twelfth", "thirteenth", "fourteenth", "fifteenth", "sixteenth",
)  # fmt: skip


@dataclass(frozen=True)
class Turn:
    category: str
    question: str
    answer: str
    choices: tuple[str, ...] = ()
    paired: frozenset[tuple[int, str]] = field(default=frozenset(), compare=False)
    """What the answer tells, by scene: things with colour, place or half; an order; the board."""

    @property
    def prompt(self) -> str:
        """What the model reads: the question, and the choices if there are any."""
        lines = [f"{letter}. {text}" for letter, text in zip("ABCD", self.choices, strict=False)]
        return "\n".join([self.question, *lines])

    @property
    def reply(self) -> str:
        """What it should say: the answer, or its letter."""
        return "ABCD"[self.choices.index(self.answer)] if self.choices else self.answer


def categories(media: str, frames: int) -> tuple[str, ...]:
    """The categories that a prompt can be asked about; `frames` of each video."""
    if media == "page":
        return ("page",)
    if media in ("image", "images"):
        return IMAGE_CATEGORIES
    if frames < 4:
        return (*IMAGE_CATEGORIES, "direction")
    return tuple(c for c in CATEGORIES if c != "page")[: None if frames >= 6 else 8]


def possible(category: str, frames: int, level: str) -> bool:
    """Whether videos of so many frames are long enough for things to differ in time."""
    patches, rules = frames // 2, LEVELS[level]
    shortest = min(rules.life[0], patches)
    if category == "order":
        return patches - shortest + 1 >= (2 if rules.asked[1] == 1 else 3)
    return category != "half" or 2 * shortest <= patches


def ask(
    scenes: Sequence[Scene],
    category: str,
    rng: np.random.Generator,
    level: str = LEVEL,
    style: str = "shape",
    told: frozenset[tuple[int, str]] = frozenset(),
) -> Turn | None:
    """One question about one of the scenes of a prompt, or None if none fits.

    style: things are named by their "shape" or their "colour".
    told: what earlier answers paired: no question may ask for that alone again.
    """
    if category == "page":
        return _page(scenes, rng)
    k = int(rng.integers(len(scenes)))
    many = int(rng.integers(LEVELS[level].asked[0], LEVELS[level].asked[1] + 1))
    turn = _ask(scenes[k], k, category, rng, many, style, told)
    if turn is None or len(scenes) == 1:
        return turn
    noun = "image" if scenes[k].frames == 1 else "video"
    question = f"In the {ORDINALS[k]} {noun}: {turn.question[0].lower()}{turn.question[1:]}"
    return replace(turn, question=question)


def _ask(
    scene: Scene, k: int, category: str, rng: np.random.Generator, many: int, style: str,
    told: frozenset[tuple[int, str]],
) -> Turn | None:  # fmt: skip
    if category == "code":
        sign = scene.signs[int(rng.integers(len(scene.signs)))]
        which = "sign" if len(scene.signs) == 1 else f"{sign.colour} sign"
        return Turn(category, f"What does the {which} say?", sign.states[0])
    if category == "count":
        return Turn(category, "How many objects appear?", NUMBERS[len(scene.things)])
    if category in ("state", "compare"):
        return _board(scene, k, category, rng, told)
    things = [t for t in scene.things if _answer(scene, t, category)]
    if category in ("colour", "shape"):
        things = [t for t in things if (k, t.shape) not in told]
    if category in ("order", "half") and many > 1:
        many = 3
    if category == "order":
        many = max(many, 2)
        things = _apart(things, rng)
    if category == "direction":
        many = 1
    if len(things) < many:
        return None
    chosen = [things[i] for i in rng.permutation(len(things))[:many]]
    if category in ("colour", "shape"):
        style = "shape" if category == "colour" else "colour"
    names = _join([name(t, style) for t in chosen])
    answers = [str(_answer(scene, t, category)) for t in chosen]
    s, does = ("", "does") if many == 1 else ("s", "do")
    if category == "colour":
        question = f"What colour{s} {'is' if many == 1 else 'are'} {names}?"
    elif category == "shape":
        question = f"What shape{s} {'is' if many == 1 else 'are'} {names}?"
    elif category == "direction":
        question = f"Which way {does} {names} move?"
    elif category == "location":
        question = f"Where {'is' if many == 1 else 'are'} {names}?"
    elif category == "half":
        question = f"In which half, first or second, {does} {names} appear?"
    else:
        question = f"In which order do {names} appear?"
        chosen.sort(key=lambda t: t.start)
        answers = [t.shape if style == "shape" else t.colour for t in chosen]
    prefix = "" if category in ("colour", "shape") else f"{category} "  # those two are one
    paired = frozenset((k, f"{prefix}{t.shape}") for t in chosen)
    if category == "order":
        paired = frozenset([(k, " ".join(sorted(t.shape for t in chosen)))])
    return None if paired <= told else Turn(category, question, ", ".join(answers), paired=paired)


def name(thing: Thing, style: str) -> str:
    return f"the {thing.shape}" if style == "shape" else f"the {thing.colour} object"


def _join(names: Sequence[str]) -> str:
    return " and ".join(part for part in (", ".join(names[:-1]), names[-1]) if part)


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
        case "order":
            return thing.shape
    raise ValueError(f"unknown category {category!r}; one of {', '.join(CATEGORIES)}")


def _apart(things: Sequence[Thing], rng: np.random.Generator) -> list[Thing]:
    """Things of which no two appear in the same patch, picked at random."""
    apart: list[Thing] = []
    for i in rng.permutation(len(things)):
        if all(abs(things[i].start - t.start) >= 2 for t in apart):
            apart.append(things[i])
    return apart


def _board(
    scene: Scene, k: int, category: str, rng: np.random.Generator, told: frozenset[tuple[int, str]]
) -> Turn | None:
    boards = scene.of_role("board")
    if not boards:
        return None
    numbers = boards[0].states
    first, second = (int(i) for i in rng.permutation(len(numbers))[:2])
    times = (first,) if category == "state" else (first, second)
    paired = frozenset((k, f"{time:02d}") for time in times)
    if paired & told:
        return None
    if category == "state":
        question = f"What number does the board show when the clock says {first:02d}?"
        return Turn(category, question, numbers[first], paired=paired)
    if numbers[first] == numbers[second]:
        return None
    question = (
        f"Which number on the board is larger, the one at {first:02d} or the one at {second:02d}?"
    )
    return Turn(category, question, max(numbers[first], numbers[second]), paired=paired)


def _page(scenes: Sequence[Scene], rng: np.random.Generator) -> Turn:
    entries = {label: code for scene in scenes for label, code in scene.entries().items()}
    labels = list(entries)
    label = labels[int(rng.integers(len(labels)))]
    return Turn("page", f"What is written after {label}?", entries[label])


def with_choices(
    turn: Turn,
    rng: np.random.Generator,
    distract: Callable[[Turn, np.random.Generator], str] | None = None,
) -> Turn:
    """The same as multiple choice, with three wrong answers of the same form.

    distract: draws an answer of the turn's form (default: that of the categories here).
    """
    distract = distract or _distract
    wrong: list[str] = []
    parts = turn.answer.split(", ")
    if turn.category == "order" and len(parts) == 2:  # or the names asked about would tell
        wrong.append(", ".join(reversed(parts)))
    tries = 0
    while len(wrong) < 3:
        other = distract(turn, rng)
        tries += 1
        # They begin differently where they can: a letter is said before the rest is thought of.
        openings = {_opening(text) for text in (turn.answer, *wrong)}
        if other == turn.answer or other in wrong or (_opening(other) in openings and tries < 30):
            continue
        wrong.append(other)
    choices = [turn.answer, *wrong]
    return replace(turn, choices=tuple(choices[i] for i in rng.permutation(4)))


def _opening(answer: str) -> str:
    """Its first word, or the first character of a code or a number."""
    word = answer.replace(",", " ").split()[0]
    return word if word.isalpha() else word[0]


def _distract(turn: Turn, rng: np.random.Generator) -> str:
    """An answer of the same form, drawn without regard to what the right one says."""
    if turn.category == "order":
        parts = turn.answer.split(", ")
        if len(parts) > 2:
            return ", ".join(parts[i] for i in rng.permutation(len(parts)))
        pool: Sequence[str] = SHAPES if parts[0] in SHAPES else tuple(COLOURS)
        return ", ".join(pool[i] for i in rng.permutation(len(pool))[:2])
    pools: dict[str, Sequence[str]] = {
        "colour": tuple(COLOURS), "shape": SHAPES, "direction": tuple(DIRECTIONS),
        "location": REGIONS, "half": ("first", "second"), "count": NUMBERS[1:],
    }  # fmt: skip
    if turn.category in pools:
        pool = pools[turn.category]
        parts = turn.answer.split(", ")
        if turn.category == "half" and len(parts) == 1:
            return str(rng.choice(["both", "neither", "first", "second"]))
        if turn.category in ("colour", "shape") and len(parts) > 1:  # no colour twice
            return ", ".join(pool[i] for i in rng.permutation(len(pool))[: len(parts)])
        return ", ".join(pool[int(rng.integers(len(pool)))] for _ in parts)
    if turn.category in ("state", "compare"):
        return str(rng.integers(*BOARD))
    kinds = (LETTERS if character in LETTERS else DIGITS for character in turn.answer)
    return "".join(pool[int(rng.integers(len(pool)))] for pool in kinds)


def chat(
    scenes: Sequence[Scene], rng: np.random.Generator, turns: int, level: str = LEVEL,
    media: str = "video", choices: float = 0.1,
) -> list[Turn]:  # fmt: skip
    """A training chat: every category in random order, then more; no answer given away."""
    kinds = categories(media, scenes[0].frames)
    wanted = [kinds[i] for i in rng.permutation(len(kinds))]
    several = len(scenes) > 1
    again = [c for c in kinds if several or c != "count" for _ in range(_AGAIN.get(c, 1))]
    while len(wanted) < turns:
        wanted.append(again[int(rng.integers(len(again)))])
    return _chosen(scenes, rng, wanted[:turns], level, choices)


def _chosen(
    scenes: Sequence[Scene], rng: np.random.Generator, wanted: Sequence[str], level: str,
    choices: float,
) -> list[Turn]:  # fmt: skip
    chosen: list[Turn] = []
    told: frozenset[tuple[int, str]] = frozenset()
    style = ("shape", "colour")[int(rng.integers(2))]
    for category in wanted:
        turn = ask(scenes, category, rng, level, style, told)
        if turn is None or any(turn.question == other.question for other in chosen):
            continue
        told |= turn.paired
        chosen.append(with_choices(turn, rng) if rng.random() < choices else turn)
    return chosen


def conversation(
    scenes: Sequence[Scene], rng: np.random.Generator, wanted: Sequence[str], level: str = LEVEL,
    choices: float = 0.0,
) -> list[Turn] | None:  # fmt: skip
    """One turn for each wanted category, or None if the scenes cannot be asked one of them."""
    turns = _chosen(scenes, rng, wanted, level, choices)
    return turns if len(turns) == len(wanted) else None
