"""Videos with sound: the same bytes again, and a soundtrack that a listener can answer from."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from purekv import PureKVError
from purekv.media import read_audio
from purekv.reference import write_dataset
from purekv.reference.data import Drawn, image, samples, suite, video
from purekv.reference.questions import NUMBERS
from purekv.reference.render import Renderer
from purekv.reference.scene import LEVELS
from purekv.reference.sound_questions import SEEN_AND_HEARD, SOUND_CATEGORIES
from purekv.reference.soundtrack import RATE, SHORTEST, wave
from tests.reference.test_data import files, records


@pytest.fixture(autouse=True, scope="module")
def renderer() -> Iterator[None]:
    shared = Renderer()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("purekv.reference.render.Renderer", lambda: shared)
        yield


def loudness(sound: np.ndarray, hertz: int) -> float:
    """Amplitude of one frequency in a piece of sound, at full scale 1."""
    turns = np.exp(-2j * np.pi * hertz * np.arange(len(sound)) / RATE)
    return 2 * abs(turns @ sound) / len(sound)


def pieces(second: np.ndarray, *starts: int, length: int = 150) -> list[np.ndarray]:
    """Of so many milliseconds."""
    return [second[start * 16 : (start + length) * 16] for start in starts]


def loudest(sound: np.ndarray, frequencies: tuple[int, ...]) -> int:
    return max(frequencies, key=lambda hertz: loudness(sound, hertz))


ROWS, COLUMNS = (697, 770, 852, 941), (1209, 1336, 1477)
KEYS = {**{(ROWS[k // 3], COLUMNS[k % 3]): str(k + 1) for k in range(9)}, (941, 1336): "0"}
NOTES = {300: "low", 600: "middle", 1200: "high"}


def listen(sound: np.ndarray) -> dict[str, object]:
    """What is in a soundtrack, from its samples alone."""
    heard: dict[str, object] = {"beeps": 0}
    for number, second in enumerate(sound.reshape(-1, RATE)):
        (middle,) = pieces(second, 400)
        first, last = pieces(second, 150, 600)
        if loudness(second, 110) > 0.02:
            heard["buzzer"] = number
        elif min(loudness(first, f) for f in (loudest(first, ROWS), loudest(first, COLUMNS))) > 0.1:
            keys = [KEYS[loudest(one, ROWS), loudest(one, COLUMNS)] for one in (first, last)]
            heard["dial"] = ", ".join(keys)
        elif max(loudness(first, hertz) for hertz in NOTES) > 0.1:
            notes = [NOTES[loudest(one, tuple(NOTES))] for one in pieces(second, 100, 400, 700)]
            heard["tune"] = ", ".join(notes)
        elif loudness(middle, 1000) > 0.1:
            heard["beeps"] += 1
    return heard


@pytest.mark.parametrize("level", LEVELS)
def test_whoever_hears_it_knows_the_answers(level: str) -> None:
    asked: set[str] = set()
    for seed, patches in ((3, SHORTEST), (4, 12)):
        for drawn in samples(9, seed, video(patches, 6), level, (0.3, 0.3, 0.4), audio=True):
            sound = wave(drawn.soundtrack)
            assert len(sound) == patches * RATE
            assert abs(sound.astype(int)).max() < 2**15 * 0.8
            heard = listen(sound / 2**15)
            scene, second = drawn.scenes[0], heard["buzzer"]
            heard["beeps"] = NUMBERS[heard["beeps"]]
            for role in ("clock", "board"):
                for text in scene.of_role(role):
                    heard[f"buzzer_{role}"] = text.states[second]
            shown = [t for t in scene.things if t.start < 2 * second + 2 and t.stop > 2 * second]
            heard["buzzer_colour"] = shown[0].colour if len(shown) == 1 else None
            for turn in drawn.turns:
                assert turn.answer == heard[turn.category], turn.question
            asked |= {turn.category for turn in drawn.turns}
    assert asked == set(SOUND_CATEGORIES)


def test_no_answer_tells_when_the_buzzer_sounds() -> None:
    for drawn in samples(30, 1, video(10, 6), turns=(0, 0, 1), audio=True):
        assert len({turn.category for turn in drawn.turns}) == 3
        assert sum(turn.category in SEEN_AND_HEARD for turn in drawn.turns) <= 1


def test_choices_are_four_of_one_form() -> None:
    drawn = list(samples(24, 2, video(6, 6), choices=1.0, audio=True))
    for turn in (turn for one in drawn for turn in one.turns):
        assert len(set(turn.choices)) == 4
        assert turn.answer in turn.choices
        assert len({(len(text.split()), text[0].isdigit()) for text in turn.choices}) == 1


def test_suites_keep_what_can_sound() -> None:
    drawn: list[Drawn] = list(suite("576", 10, 0, audio=True))
    assert len(drawn) == 10
    assert {one.geometry.media for one in drawn} == {"video"}


def test_the_same_bytes_again_and_every_sample_of_the_wave(tmp_path: Path) -> None:
    arguments = {"n": 2, "seed": 1, "geometry": video(6, 6), "audio": True}
    for name in ("a", "b"):
        path = write_dataset(tmp_path / name, **arguments)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    other = write_dataset(tmp_path / "c", **arguments | {"seed": 2}).parent
    assert not set(files(tmp_path / "a").values()) & set(files(other).values())
    for record, drawn in zip(records(path), samples(2, 1, video(6, 6), audio=True), strict=True):
        stored = read_audio(path.parent / record["video"])
        assert np.array_equal(stored, wave(drawn.soundtrack).astype(np.float32) / 2**15)
    silent = write_dataset(tmp_path / "b", **arguments | {"audio": False})
    assert read_audio(silent.parent / records(silent)[0]["video"]) is None


@pytest.mark.parametrize("geometry", [image(6), video(8, 6, 2), video(5, 6)], ids=str)
def test_what_cannot_sound_is_refused(tmp_path: Path, geometry) -> None:
    with pytest.raises(PureKVError, match="one video of 12 frames or more"):
        write_dataset(tmp_path / "data", n=1, geometry=geometry, audio=True)
    assert not (tmp_path / "data").exists()
