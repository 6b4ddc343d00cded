"""Questions: true of their scenes, balanced, and not answered by one another or by their words."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest

from purekv.reference.data import SUITES, Drawn, Geometry, draw, image, page, samples, suite, video
from purekv.reference.questions import (
    CATEGORIES,
    IMAGE_CATEGORIES,
    ORDINALS,
    Turn,
    ask,
    categories,
    chat,
    with_choices,
)
from purekv.reference.scene import (
    COLOURS,
    DIRECTIONS,
    LEVELS,
    REGIONS,
    SHAPES,
    SIGN_COLOURS,
    Scene,
    Thing,
)

GEOMETRIES = [
    video(10, 10), video(16, 6), video(9, 9), video(64, 8), video(2, 6), video(1, 7), image(10),
    image(6), video(7, 8, 2), video(3, 6, 3), image(9, 16), page(10), page(32, 4),
]  # fmt: skip
NUMBERS = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7}
PREFIX = re.compile(r"In the (\w+) (video|image): (.*)")

each_geometry = pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
each_level = pytest.mark.parametrize("level", LEVELS)


# What a question is about, read from its words alone


def scene_asked(question: str, scenes: Sequence[Scene]) -> tuple[Scene, str]:
    """The scene that a question names, and the rest of its words."""
    if len(scenes) == 1 or scenes[0].of_role("page"):
        assert not PREFIX.match(question)
        return scenes[0], question
    match = PREFIX.match(question)
    assert match
    assert match[2] == ("image" if scenes[0].frames == 1 else "video")
    return scenes[ORDINALS.index(match[1])], match[3][0].upper() + match[3][1:]


def things_asked(question: str, scene: Scene) -> list[Thing]:
    """The things a question names, in its order."""
    found = []
    for word in re.findall(r"[Tt]he (\w+)", question):
        (thing,) = [t for t in scene.things if word in (t.shape, t.colour)]
        found.append(thing)
    return found


def third(centre: float, size: int) -> int | None:
    """0, 1, 2 for the thirds of a frame; None where people could disagree."""
    place = 3 * centre / size
    return None if min(abs(place - 1), abs(place - 2)) < 0.1 else int(place)


def region(thing: Thing, size: int) -> str:
    column, row = (third(corner + thing.size / 2, size) for corner in (thing.x, thing.y))
    assert row is not None
    assert column is not None
    return REGIONS[3 * row + column]


def direction(thing: Thing) -> str:
    words = (
        {-1: "up", 1: "down"}.get(np.sign(thing.dy)),
        {-1: "left", 1: "right"}.get(np.sign(thing.dx)),
    )
    return " ".join(word for word in words if word)


def seen(thing: Thing) -> set[int]:
    return set(range(thing.start, thing.stop))


def check(turn: Turn, scenes: Sequence[Scene]) -> None:
    """That the answer is true, and right in its form."""
    scene, question = scene_asked(turn.question, scenes)
    parts = turn.answer.split(", ")
    if turn.category == "code":
        colour = re.fullmatch(r"What does the (?:(\w+) )?sign say\?", question)
        assert colour
        assert (colour[1] is None) == (len(scene.signs) == 1)
        (sign,) = [s for s in scene.signs if colour[1] in (None, s.colour)]
        assert (turn.answer,) == sign.states
        return
    if turn.category == "count":
        assert question == "How many objects appear?"
        assert NUMBERS[turn.answer] == len(scene.things)
        return
    if turn.category in ("state", "compare"):
        (clock,), (board,) = scene.of_role("clock"), scene.of_role("board")
        shown = dict(zip(clock.states, board.states, strict=True))
        numbers = [shown[time] for time in re.findall(r"\d\d", question)]
        assert len(numbers) == len(set(numbers)) == (1 if turn.category == "state" else 2)
        assert turn.answer == max(numbers, key=int)
        return
    if turn.category == "page":
        label = re.fullmatch(r"What is written after (\w\d)\?", question)
        assert label
        written = " ".join(s.texts[0].states[0] for s in scenes)
        assert re.findall(rf"(?<!\w){label[1]} (\w+)", written) == [turn.answer]
        return
    things = things_asked(question, scene)
    assert len(things) == len(set(things)) == len(parts)
    if turn.category == "colour":
        assert parts == [t.colour for t in things]
    elif turn.category == "shape":
        assert parts == [t.shape for t in things]
    elif turn.category == "direction":
        assert parts == [direction(t) for t in things]
    elif turn.category == "location":
        assert all(t.dx == t.dy == 0 for t in things)
        assert parts == [region(t, scene.size) for t in things]
    elif turn.category == "half":
        halves = {"first": range(scene.frames // 2 + 1), "second": range(scene.frames)}
        for thing, part in zip(things, parts, strict=True):
            lived = max(seen(thing)) + 1 if part == "first" else min(seen(thing))
            assert 2 * lived <= scene.frames if part == "first" else 2 * lived >= scene.frames
            assert seen(thing) <= set(halves[part])
    else:
        assert turn.category == "order"
        by_name = {name: t for t in things for name in (t.shape, t.colour)}
        starts = [by_name[part].start // 2 for part in parts]
        assert all(a < b for a, b in pairwise(starts))  # in different patches
        assert len({id(by_name[part]) for part in parts}) == len(things)


@each_level
@each_geometry
def test_answers_are_true(geometry: Geometry, level: str) -> None:
    kinds = categories(geometry.media, geometry.frames)
    found: Counter[str] = Counter()
    for index in range(30):
        scenes = draw(3, index, geometry, level)
        turns = chat(scenes, np.random.default_rng(index), 12, level, geometry.media)
        assert {turn.category for turn in turns} <= set(kinds)
        assert len({turn.question for turn in turns}) == len(turns)
        for turn in turns:
            check(turn, scenes)
            found[turn.category] += 1
    for drawn in samples(2 * len(kinds), 3, geometry, level):
        assert drawn.geometry == geometry
        for turn in drawn.turns:
            check(turn, drawn.scenes)
            found[turn.category] += 1
    if geometry.patches > 6 or geometry.frames == 1:
        assert set(found) == set(kinds)


@pytest.mark.parametrize(("level", "least"), [("easy", 1), ("standard", 2), ("hard", 2)])
def test_a_question_is_about_as_many_things_as_its_level_says(level: str, least: int) -> None:
    counts: dict[str, set[int]] = {}
    for drawn in samples(200, 5, video(10, 10), level, choices=0):
        for turn in drawn.turns:
            counts.setdefault(turn.category, set()).add(len(turn.answer.split(", ")))
    assert counts["direction"] == {1}
    assert counts["order"] == {2 if least == 1 else 3}
    most = LEVELS[level].asked[1]
    for category in ("colour", "shape", "location"):
        assert counts[category] == set(range(least, most + 1))


# Balance


@each_level
@each_geometry
def test_samples_are_balanced_and_answerable(geometry: Geometry, level: str) -> None:
    drawn = list(samples(44, 7, geometry, level))
    first = Counter(d.turns[0].category for d in drawn)
    assert max(first.values()) - min(first.values()) <= 1
    kinds = categories(geometry.media, geometry.frames)
    short = geometry.frames > 1 and geometry.patches < 6
    assert set(first) <= set(kinds)
    assert short or set(first) == set(kinds)
    assert {len(d.turns) for d in drawn} == {1, 2, 3}
    for d in drawn:
        if geometry.media == "page":
            assert len({t.question for t in d.turns}) == len(d.turns)
        else:
            assert len({t.category for t in d.turns}) == len(d.turns)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("patches", [1, 2, 3, 4, 5])
def test_short_videos_are_asked_what_they_can_show(level: str, patches: int) -> None:
    """That it ends at all, and with every question that some scene allows."""
    geometry = video(patches, 8)
    asked = {d.turns[0].category for d in samples(30, 1, geometry, level)}
    for category in categories("video", geometry.frames):
        some = any(
            ask(draw(2, i, geometry, level), category, np.random.default_rng(i), level)
            for i in range(150)
        )
        assert (category in asked) == some


def test_categories_that_need_time_are_left_to_video() -> None:
    assert categories("video", 20) == CATEGORIES[:-1] == categories("videos", 6)
    assert categories("image", 1) == categories("images", 1) == IMAGE_CATEGORIES
    assert categories("page", 1) == ("page",)
    assert set(CATEGORIES) - set(categories("video", 4)) == {"state", "compare", "page"}
    assert set(categories("video", 2)) == {*IMAGE_CATEGORIES, "direction"}


def test_turns_and_choices_are_drawn_in_their_shares() -> None:
    drawn = list(samples(300, 2, video(7, 8), turns=(0.2, 0.2, 0.6), choices=0.5))
    lengths = Counter(len(d.turns) for d in drawn)
    assert 0.5 < lengths[3] / 300 < 0.7
    turns = [turn for d in drawn for turn in d.turns]
    assert 0.4 < sum(bool(turn.choices) for turn in turns) / len(turns) < 0.6
    drawn = list(samples(30, 2, video(7, 8), turns=(0, 1, 0), choices=0))
    assert all(len(d.turns) == 2 and not any(t.choices for t in d.turns) for d in drawn)


@pytest.fixture(scope="module")
def many() -> list[Drawn]:
    return list(samples(2000, 1, video(10, 10), choices=0.2))


@pytest.mark.parametrize(
    ("category", "most"),
    [
        ("half", 0.62), ("direction", 0.2), ("count", 0.45), ("location", 0.2), ("colour", 0.2),
        ("shape", 0.2), ("code", 0.03), ("state", 0.05), ("compare", 0.08),
    ],
)  # fmt: skip
def test_no_answer_dominates(many: list[Drawn], category: str, most: float) -> None:
    counts = Counter(
        part
        for d in many for turn in d.turns if turn.category == category
        for part in turn.answer.split(", ")
    )  # fmt: skip
    assert counts.total() > 200
    assert counts.most_common(1)[0][1] / counts.total() < most, counts
    whole = {"colour": COLOURS, "shape": SHAPES, "direction": DIRECTIONS, "location": REGIONS}
    assert set(counts) >= set(whole.get(category, ()))


def test_order_is_not_the_order_of_the_words(many: list[Drawn]) -> None:
    kept = [
        list(re.findall(r"the (\w+)", turn.question)) == turn.answer.split(", ")
        for d in many for turn in d.turns if turn.category == "order"
    ]  # fmt: skip
    assert 0.08 < sum(kept) / len(kept) < 0.26  # one of six


def test_a_thing_named_first_is_not_special(many: list[Drawn]) -> None:
    """The board's larger number, and the halves of what is named first, can be either."""
    larger = []
    for d in many:
        for turn in d.turns:
            if turn.category == "compare":
                times = re.findall(r"\d\d", turn.question)
                larger.append(d.scenes[0].of_role("board")[0].states[int(times[0])] == turn.answer)
    assert 0.4 < sum(larger) / len(larger) < 0.6


def test_videos_and_images_of_a_prompt_are_asked_about_alike() -> None:
    for geometry in (video(8, 6, 2), image(12, 4)):
        asked = Counter(
            re.match(r"In the (\w+)", turn.question)[1]  # type: ignore[index]
            for d in samples(500, 4, geometry)
            for turn in d.turns
        )
        assert set(asked) == set(ORDINALS[: geometry.count])
        assert max(asked.values()) < 1.5 * min(asked.values())


# Nothing is given away


def facts(turn: Turn, scenes: Sequence[Scene]) -> set[tuple]:
    """What an answer consists of: it is given away if earlier ones held all of that."""
    scene, question = scene_asked(turn.question, scenes)
    k = scenes.index(scene)
    if turn.category in ("state", "compare"):
        return {(k, "board", time) for time in re.findall(r"\d\d", question)}
    if turn.category in ("code", "count", "page"):
        return {(k, turn.question)}
    things = things_asked(question, scene)
    if turn.category == "order":
        return {(k, "order", frozenset(t.shape for t in things))}
    kind = "look" if turn.category in ("colour", "shape") else turn.category
    return {(k, kind, t.shape) for t in things}


@each_level
@pytest.mark.parametrize("geometry", [video(8, 8), video(16, 16), image(10), video(6, 6, 2)])
def test_no_turn_answers_another(geometry: Geometry, level: str) -> None:
    chats = [(d.scenes, d.turns) for d in samples(60, 9, geometry, level, turns=(0, 0, 1))]
    for index in range(30):
        scenes = draw(9, index, geometry, level)
        rng = np.random.default_rng(index)
        chats.append((scenes, chat(scenes, rng, 24, level, geometry.media)))
    for scenes, turns in chats:
        told: set[tuple] = set()
        styles = set()
        for turn in turns:
            asked = facts(turn, scenes)
            if turn.category in ("colour", "shape", "state", "compare"):
                assert not asked & told  # nor half of an answer
            assert not asked <= told
            told |= asked
            _, question = scene_asked(turn.question, scenes)
            if turn.category in ("direction", "location", "half", "order"):
                named = re.findall(r"the (\w+)", question)
                styles |= {"shape" if name in SHAPES else "colour" for name in named}
                # Nor may the words of one question pair the names of a thing.
                assert not any(f"{c} {s}" in question for c in COLOURS for s in SHAPES)
        assert len(styles) <= 1  # or the second name of a thing could be found by elimination


def test_questions_repeat_with_their_scenes_alone() -> None:
    """The same prompt and category have many questions, and they do not repeat in a chat."""
    scenes = draw(0, 0, video(10, 10), "standard")
    asked = {
        turn.question
        for i in range(60)
        if (turn := ask(scenes, "colour", np.random.default_rng(i))) is not None
    }
    assert len(asked) > 5


# Multiple choice


@each_level
@each_geometry
def test_one_choice_is_right_and_none_stands_out(geometry: Geometry, level: str) -> None:
    kinds = categories(geometry.media, geometry.frames)
    letters: Counter[str] = Counter()
    for index in range(80):
        scenes = draw(11, index, geometry, level)
        rng = np.random.default_rng(index)
        turn = ask(scenes, kinds[index % len(kinds)], rng, level)
        if turn is None:
            continue
        assert (turn.prompt, turn.reply) == (turn.question, turn.answer)
        closed = with_choices(turn, rng)
        assert (closed.question, closed.answer) == (turn.question, turn.answer)
        assert len(set(closed.choices)) == 4
        assert closed.choices.count(turn.answer) == 1
        assert closed.choices["ABCD".index(closed.reply)] == turn.answer
        lines = closed.prompt.splitlines()
        assert lines[0] == turn.question
        assert lines[1:] == [f"{k}. {c}" for k, c in zip("ABCD", closed.choices, strict=True)]
        lengths = {len(choice.split(", ")) for choice in closed.choices}
        assert len(lengths) == 1
        letters[closed.reply] += 1
    assert set(letters) == set("ABCD")


CODE = re.compile(r"[A-Z]\d[A-Z]\d")


@pytest.mark.parametrize("level", LEVELS)
def test_wrong_choices_look_like_right_ones(level: str) -> None:
    """Whatever a character or a part of right answers can be, wrong ones are as often."""
    right: dict[str, Counter] = {}
    wrong: dict[str, Counter] = {}
    for drawn in samples(1200, 3, video(8, 8), level, turns=(1, 0, 0), choices=1):
        (turn,) = drawn.turns
        if turn.category in ("half", "count"):
            continue
        for choice in turn.choices:
            kinds = right if choice == turn.answer else wrong
            parts = choice if turn.category in ("code", "state") else choice.split(", ")
            kinds.setdefault(turn.category, Counter()).update(parts)
            if turn.category == "code":
                assert CODE.fullmatch(choice)
    for category in ("code", "state", "colour", "shape", "direction", "location"):
        assert set(right[category]) <= set(wrong[category])
        for part, n in right[category].items():
            if n > 30:
                share = n / right[category].total()
                assert 0.5 < wrong[category][part] / wrong[category].total() / share < 2


@pytest.mark.parametrize("level", LEVELS)
def test_the_words_of_an_order_question_do_not_choose(level: str) -> None:
    for drawn in samples(200, 3, video(8, 8), level, turns=(1, 0, 0), choices=1):
        (turn,) = drawn.turns
        if turn.category == "order":
            named = set(re.findall(r"the (\w+)", turn.question))
            fitting = [c for c in turn.choices if set(c.split(", ")) == named]
            assert len(fitting) >= 2


# Suites


@pytest.mark.parametrize("name", SUITES)
def test_a_suite_has_its_shares_and_its_own_samples(name: str) -> None:
    drawn = list(suite(name, 100, 3))
    counts = Counter(d.geometry for d in drawn)
    assert counts == {g: round(100 * share) for g, share in SUITES[name]}
    for n in (1, 7):
        assert len(list(suite(name, n, 3))) == n
    scenes = [scene for d in drawn for scene in d.scenes]
    assert len(set(scenes)) == len(scenes)
    assert [(d.scenes, d.turns) for d in drawn] == [
        (d.scenes, d.turns) for d in suite(name, 100, 3)
    ]
    other = {scene for d in suite(name, 100, 4) for scene in d.scenes}
    assert not other & set(scenes)


def test_signs_have_the_colours_that_questions_name() -> None:
    asked = {
        turn.question
        for d in samples(200, 3, video(8, 8), "hard")
        for turn in d.turns
        if turn.category == "code"
    }
    assert asked == {f"What does the {colour} sign say?" for colour in SIGN_COLOURS}
