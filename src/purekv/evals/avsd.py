"""Audio-visual scene-aware dialogs (AVSD, arXiv:1901.09107), as the DSTC challenges publish them.

`{"dialogs": [{"image_id", "caption", "summary", "dialog": [{"question", "answer"}, ...]}, ...]}`,
with videos named by `image_id`. Where several people answered the last question, its answer is a
list, or the dialog is there again with another answer. Captions and summaries are not used: they
would tell what the cache is asked for.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from purekv.errors import PureKVError
from purekv.evals.samples import Sample, Turn

UNDISCLOSED = "__UNDISCLOSED__"
"""In the place of an answer that a challenge kept for itself."""
CATEGORY = "dialog"


@dataclass(frozen=True)
class Dialogs:
    """What could be made of a file."""

    samples: list[Sample]
    missing: list[str]
    """Names of the videos that are not there; their dialogs are left out."""
    undisclosed: int
    """Dialogs left out because no answer, or with `last` not the last one, is known."""


def read_avsd(path: str | Path, media: str | Path, last: bool = False) -> Dialogs:
    """Dialogs as samples: every question in turn, each behind the gold answers before it.

    Args:
        media: folder of the videos.
        last: ask the last question only, as the challenges do; the first prompt tells the dialog
            before it.

    Raises:
        PureKVError: a file or folder is missing, the file is none of AVSD, or nothing is left.
    """
    path, media = Path(path), Path(media)
    dialogs = _merged(_dialogs(path), path)
    videos = _videos(media)
    samples: list[Sample] = []
    missing: list[str] = []
    undisclosed = 0
    seen: dict[str, int] = {}
    for name, turns in dialogs:
        known = next((n for n, turn in enumerate(turns) if turn.answer == UNDISCLOSED), len(turns))
        if known == 0 or (last and known < len(turns)):
            undisclosed += 1
        elif name not in videos:
            missing.append(name)
        else:
            seen[name] = seen.get(name, 0) + 1
            again = f"-{seen[name]}" if seen[name] > 1 else ""
            first = known - 1 if last else 0
            samples.append(
                Sample(f"{name}{again}", (videos[name],), (), turns[first:known], turns[:first])
            )
    if not samples:
        raise PureKVError(
            f"no dialog of {path} can be asked: {len(missing)} lack their video in {media}"
            + (f" (such as {missing[0]}.mp4)" if missing else "")
            + f", {undisclosed} their answers; give the folder of the videos, and the file with "
            "the references"
        )
    return Dialogs(samples, missing, undisclosed)


def _dialogs(path: Path) -> list[Any]:
    if not path.is_file():
        raise PureKVError(f"data file not found: {path}")
    try:
        dialogs = json.loads(path.read_text(encoding="utf-8-sig"))["dialogs"]
        if isinstance(dialogs, list):
            return dialogs
    except (ValueError, KeyError, TypeError):
        pass
    raise PureKVError(f'{path} is not an AVSD file, which is an object with a list "dialogs"')


def _merged(dialogs: Sequence[Any], path: Path) -> list[tuple[str, tuple[Turn, ...]]]:
    """Name and turns of each dialog; those that differ in the last answer only are one."""
    found: dict[Any, tuple[str, tuple[Turn, ...]]] = {}
    for number, dialog in enumerate(dialogs):
        try:
            name = str(dialog["image_id"])
            turns = tuple(_turn(one) for one in dialog["dialog"])
            last = turns[-1]
        except (KeyError, TypeError, IndexError, ValueError) as error:
            raise PureKVError(
                f"{path}: dialog {number} is not one of AVSD ({error!r}); it needs image_id, and "
                "dialog with question and answer"
            ) from error
        key = (name, *((turn.question, turn.answer) for turn in turns[:-1]), last.question)
        if key in found:
            _, (*others, before) = found[key]
            references = tuple(dict.fromkeys(before.references + last.references))
            turns = (*others, replace(before, references=references))
        found[key] = (name, turns)
    return list(found.values())


def _turn(data: Mapping[str, Any]) -> Turn:
    question, answers = data["question"], data["answer"]
    if isinstance(answers, str):
        answers = [answers]
    if not answers or not all(isinstance(text, str) for text in (question, *answers)):
        raise ValueError("question and answer must be text")
    return Turn(question, answers[0], CATEGORY, references=tuple(answers))


def _videos(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise PureKVError(f"no folder {folder}; give that of the videos with --media")
    return {path.stem: path for path in sorted(folder.iterdir()) if path.is_file()}
