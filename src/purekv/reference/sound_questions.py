"""Questions that need a video's sound, alone or together with its picture."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .questions import NUMBERS, Turn, with_choices
from .scene import BOARD, COLOURS, Scene
from .soundtrack import MOST_BEEPS, NOTES, Soundtrack, in_view

HEARD = ("beeps", "tune", "dial")
"""Categories that need the sound alone."""
SEEN_AND_HEARD = ("buzzer_clock", "buzzer_board", "buzzer_colour")
"""Categories that need both."""
SOUND_CATEGORIES = tuple(
    category for pair in zip(HEARD, SEEN_AND_HEARD, strict=True) for category in pair
)


def sound_conversation(
    scene: Scene, track: Soundtrack, rng: np.random.Generator, wanted: Sequence[str],
    choices: float = 0.0,
) -> list[Turn] | None:  # fmt: skip
    """One turn for each wanted category, or None if one cannot be asked.

    At most one is about the buzzer: the answer to another would tell when it sounds, and then the
    picture is enough.
    """
    if len(set(wanted) & set(SEEN_AND_HEARD)) > 1:
        return None
    turns = []
    for category in wanted:
        turn = ask_sound(scene, track, category)
        if turn is None:
            return None
        if rng.random() < choices:
            turn = with_choices(turn, rng, lambda asked, rng: _distract(asked, rng, track.seconds))
        turns.append(turn)
    return turns


def ask_sound(scene: Scene, track: Soundtrack, category: str) -> Turn | None:
    """The question of a category, or None if the scene lacks what it is about."""
    when = "when the buzzer sounds"
    if category == "beeps":
        return Turn(category, "How many short beeps are heard?", NUMBERS[len(track.beeps)])
    if category == "tune":
        question = "In which order come the low, the middle and the high note of the tune?"
        return Turn(category, question, ", ".join(track.tune[1]))
    if category == "dial":
        return Turn(category, "Which two digits are dialled?", ", ".join(track.dial[1]))
    if category == "buzzer_colour":
        seen = in_view(scene, track.buzzer)
        if len(seen) != 1:
            return None
        colour = scene.things[seen[0]].colour
        return Turn(category, f"What colour is the object in view {when}?", colour)
    role = category.removeprefix("buzzer_")
    texts = scene.of_role(role)
    if not texts:
        return None
    says = texts[0].states[track.buzzer]
    if role == "clock":
        return Turn(category, f"What does the clock say {when}?", says)
    return Turn(category, f"What number does the board show {when}?", says)


def _distract(turn: Turn, rng: np.random.Generator, seconds: int) -> str:
    """An answer of the same form, drawn without regard to what the right one says."""
    match turn.category:
        case "beeps":
            return NUMBERS[int(rng.integers(1, max(MOST_BEEPS.values()) + 1))]
        case "tune":
            return ", ".join(tuple(NOTES)[i] for i in rng.permutation(len(NOTES)))
        case "dial":
            return ", ".join(str(digit) for digit in rng.integers(0, 10, 2))
        case "buzzer_colour":
            return tuple(COLOURS)[int(rng.integers(len(COLOURS)))]
        case "buzzer_clock":
            return f"{int(rng.integers(seconds)):02d}"
    return str(rng.integers(*BOARD))
