"""A run's folder: what was asked, a record a line, the results. Killed runs go on.

- `run.json`: the settings; a run that goes on must have the same.
- the log, e.g. `samples.jsonl`: records as they come; in the data's order at the end.
- what the verb makes of them, such as `results.json`.

At the end these are the same bytes whether the run was broken off or not.
"""

import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from purekv.errors import PureKVError

_RUN = "run.json"


class Record(Protocol):
    """What became of one sample."""

    @property
    def id(self) -> str: ...

    def to_dict(self) -> dict[str, Any]: ...


Kind = TypeVar("Kind", bound=Record)


class Store(Generic[Kind]):
    """Opened for one run. The folder is left empty until there is a record: a start that fails
    does not block it.

    Args:
        settings: whatever the records depend on, plain JSON types.
        resume: go on with the records that are there.
        log: the records' file.
        parse: the inverse of a record's `to_dict`.

    Raises:
        PureKVError: the folder holds another run, or one that was not to be resumed.
    """

    def __init__(
        self,
        directory: Path,
        settings: dict[str, Any],
        resume: bool,
        *,
        log: str,
        parse: Callable[[Mapping[str, Any]], Kind],
    ) -> None:
        self.directory = directory
        self.log = directory / log
        self.records: dict[str, Kind] = {}
        self._settings = settings
        before = _read_json(directory / _RUN)
        if before is not None and not resume:
            raise PureKVError(
                f"{directory} holds a run; add --resume to go on with it, or name another folder "
                "with --out"
            )
        if before is not None and before != settings:
            changed = [k for k in {**before, **settings} if before.get(k) != settings.get(k)]
            raise PureKVError(
                f"{directory} holds a run with another {', '.join(sorted(changed))}; "
                "repeat its settings to resume it, or name another folder with --out"
            )
        directory.mkdir(parents=True, exist_ok=True)
        self._begun = before is not None
        if self._begun:
            self._load(parse)

    def _load(self, parse: Callable[[Mapping[str, Any]], Kind]) -> None:
        """Read what is whole; a line that was cut off by the end of the run is dropped."""
        if not self.log.exists():
            return
        kept = []
        for line in self.log.read_text(encoding="utf-8").splitlines(keepends=True):
            try:
                record = parse(json.loads(line))
            except (ValueError, TypeError):
                break
            if not line.endswith("\n"):
                break
            self.records[record.id] = record
            kept.append(line)
        _replace(self.log, "".join(kept))

    def add(self, records: Iterable[Kind]) -> None:
        """Keep the records of a batch, whatever happens next."""
        records = list(records)
        if not self._begun:
            self.log.unlink(missing_ok=True)
            self.write(_RUN, self._settings)
            self._begun = True
        with self.log.open("a", encoding="utf-8") as file:
            file.write("".join(_line(record) for record in records))
            file.flush()
            os.fsync(file.fileno())
        self.records |= {record.id: record for record in records}

    def sort(self, ids: Iterable[str]) -> None:
        """Put the records in this order."""
        self.records = {name: self.records[name] for name in ids if name in self.records}
        lines = [_line(record) for record in self.records.values()]
        _replace(self.log, "".join(lines))

    def write(self, name: str, data: Any) -> None:
        _replace(self.directory / name, json.dumps(data, indent=1) + "\n")


def _line(record: Record) -> str:
    return json.dumps(record.to_dict()) + "\n"


def _replace(path: Path, text: str) -> None:
    """Write in one piece: even if the machine stops, the old bytes or the new ones are there."""
    temporary = path.with_name(f".{path.name}")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise PureKVError(f"{path} is damaged ({error}); name another folder with --out") from error
