"""Data sets: one JSON object a line, media beside the file."""

import json
import os
import string
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from purekv.errors import PureKVError
from purekv.evals.metrics import chosen_letter, exact_match


@dataclass(frozen=True)
class Turn:
    """One question and its gold answer: the letter, where there are choices; empty if unknown."""

    question: str
    answer: str
    category: str
    choices: tuple[str, ...] = ()
    references: tuple[str, ...] = ()
    """Answers as people gave them, where it is free text: also scored by CIDEr and ROUGE-L."""

    @property
    def prompt(self) -> str:
        """The question, and a line for each choice: "A. red"."""
        lines = (f"{letter}. {text}" for letter, text in zip(_LETTERS, self.choices, strict=False))
        return "\n".join([self.question, *lines])

    def accepts(self, prediction: str) -> bool:
        """Whether the prediction is right: the same letter, or else the words of an answer."""
        if self.choices:
            return chosen_letter(prediction) == self.answer
        return any(exact_match(prediction, gold) for gold in (self.answer, *self.references))


@dataclass(frozen=True)
class Sample:
    """One chat about videos, images or both."""

    id: str
    videos: tuple[Path, ...]
    images: tuple[Path, ...]
    turns: tuple[Turn, ...]
    history: tuple[Turn, ...] = ()
    """Turns that the first prompt tells with their gold answers, and that are not asked."""

    @property
    def media(self) -> str:
        """ "video", "videos", "image", "images" or "mixed"."""
        if self.videos and self.images:
            return "mixed"
        kind = "video" if self.videos else "image"
        return kind if len(self.videos + self.images) == 1 else f"{kind}s"


_LETTERS = string.ascii_uppercase


def read_samples(path: str | Path, limit: int | None = None, *, gold: bool = True) -> list[Sample]:
    """Read a data set in the project's format.

    Each line: `{"id", "video" | "videos" | "image" | "images", "turns": [{"question", "answer",
    "choices"?, "references"?, "category"?}], "history"?: [{"question", "answer"}], "category"?}`,
    media paths relative to the file. With choices, the answer is a letter or the text of one;
    references are answers to free-text questions, by several people. Without `gold`, answers are
    neither needed nor read.

    Raises:
        PureKVError: the file is missing, a line is not such an object, or has another one's id.
    """
    path = Path(path)
    if not path.is_file():
        raise PureKVError(f"data file not found: {path}")
    samples: list[Sample] = []
    lines_of: dict[str, int] = {}
    with path.open("rb") as lines:  # a line that is no text is named like any other
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            if limit is not None and len(samples) == limit:
                break
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                sample = _sample(json.loads(text), path.parent, gold)
            except (ValueError, KeyError, TypeError) as error:
                raise PureKVError(
                    f"{path}:{number} is not a sample ({error}); a line needs id, video, videos, "
                    f"image or images, and turns with question{' and answer' if gold else ''}"
                ) from error
            if sample.id in lines_of:
                raise PureKVError(
                    f"{path}:{number}: 2 samples have the same id {sample.id!r}, in lines "
                    f"{lines_of[sample.id]} and {number}; make the ids unique"
                )
            lines_of[sample.id] = number
            samples.append(sample)
    return samples


def write_samples(path: str | Path, samples: Iterable[Sample]) -> None:
    """The inverse of `read_samples`, in one piece; media paths relative to the file.

    Raises:
        PureKVError: another file is there.
    """
    path = Path(path)
    text = "".join(json.dumps(_line(sample, path.parent)) + "\n" for sample in samples)
    if path.exists():
        if path.is_file() and path.read_bytes() == text.encode():
            return
        raise PureKVError(f"{path} exists; name another file")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _line(sample: Sample, folder: Path) -> dict[str, Any]:
    line: dict[str, Any] = {"id": sample.id}
    for name, paths in (("video", sample.videos), ("image", sample.images)):
        places = [os.path.relpath(path, folder) for path in paths]
        if places:
            line |= {name: places[0]} if len(places) == 1 else {f"{name}s": places}
    if sample.history:
        line["history"] = [{"question": t.question, "answer": t.answer} for t in sample.history]
    line["turns"] = [
        {name: value for name, value in asdict(turn).items() if value} for turn in sample.turns
    ]
    return line


def _sample(data: Any, folder: Path, gold: bool) -> Sample:
    _check_object(data, "the line")
    if isinstance(data["id"], bool) or not isinstance(data["id"], str | int):
        raise ValueError(f"id must be text or a whole number, not {json.dumps(data['id'])}")
    videos, images = _paths(data, "video", folder), _paths(data, "image", folder)
    if not images and not videos:
        raise ValueError("no media")
    category = data.get("category", "all")
    if not isinstance(data["turns"], list):
        raise ValueError(f"turns must be a list, not {json.dumps(data['turns'])}")
    turns = tuple(_turn(turn, category, gold) for turn in data["turns"])
    if not turns:
        raise ValueError("no turns")
    history = data.get("history", [])
    if not isinstance(history, list):
        raise ValueError(f"history must be a list, not {json.dumps(history)}")
    told = tuple(_turn(turn, category, True) for turn in history)
    return Sample(str(data["id"]), videos, images, turns, told)


def _paths(data: Mapping[str, Any], kind: str, folder: Path) -> tuple[Path, ...]:
    """What `kind` or its plural names."""
    several = f"{kind}s"
    if kind in data and several in data:
        raise ValueError(f"both {kind} and {several}; write one of them")
    names = data.get(several, [data[kind]] if kind in data else [])
    # One file has one name: samples about the same media are not independent.
    return tuple(Path(os.path.normpath(folder / name)) for name in _texts(names, several))


def _turn(data: Any, category: Any, gold: bool) -> Turn:
    _check_object(data, "a turn")
    texts = [data["question"], data["answer"] if gold else ""]
    question, answer = _texts(texts, "question and answer" if gold else "question")
    choices = _texts(data.get("choices") or [], "choices")
    if choices and not 2 <= len(choices) <= len(_LETTERS):
        raise ValueError(f"{len(choices)} choices; use 2 to {len(_LETTERS)}")
    if choices and gold:
        answer = _gold_letter(answer, choices)
    references = _texts(data.get("references") or [], "references")
    if choices and references:
        raise ValueError("both choices and references; an answer is one of few or free text")
    (category,) = _texts([data.get("category", category)], "category")
    return Turn(question, answer, category, choices, references)


def _check_object(data: Any, name: str) -> None:
    if not isinstance(data, dict):
        raise ValueError(f"{name} must be an object, not {json.dumps(data)}")


def _texts(values: Any, name: str) -> tuple[str, ...]:
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise ValueError(f"{name} must be text, not {json.dumps(values)}")
    return tuple(values)


def _gold_letter(answer: str, choices: tuple[str, ...]) -> str:
    letters = _LETTERS[: len(choices)]
    written = answer.strip(string.punctuation + string.whitespace).upper()
    if len(written) == 1 and written in letters:
        return written
    for letter, text in zip(letters, choices, strict=True):
        if exact_match(answer, text):
            return letter
    raise ValueError(f"the answer {answer!r} is none of the choices {', '.join(choices)}")
