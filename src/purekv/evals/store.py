"""An evaluation's folder: what was asked, each sample's outcome, the table. Killed runs go on.

- `run.json`: the settings; a run that goes on must have the same.
- `samples.jsonl`: a record a line, written batch by batch; in the data's order at the end.
- `results.json`: the rows, the same bytes whether the run was broken off or not.
- `timing.json`: seconds and tokens a second, which differ from run to run.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from purekv.errors import PureKVError
from purekv.evals.suite import Record

_RUN, _SAMPLES = "run.json", "samples.jsonl"


class Store:
    """Opened for one run. The folder is left empty until there is a record: a start that fails
    does not block it.

    Args:
        settings: whatever the records depend on, plain JSON types.
        resume: go on with the records that are there.

    Raises:
        PureKVError: the folder holds another run, or one that was not to be resumed.
    """

    def __init__(self, directory: Path, settings: dict[str, Any], resume: bool) -> None:
        self.directory = directory
        self.records: dict[str, Record] = {}
        self._settings = settings
        before = _read_json(directory / _RUN)
        if before is not None and not resume:
            raise PureKVError(
                f"{directory} holds an evaluation; add --resume to go on with it, or name another "
                "folder with --out"
            )
        if before is not None and before != settings:
            changed = [k for k in {**before, **settings} if before.get(k) != settings.get(k)]
            raise PureKVError(
                f"{directory} holds an evaluation with another {', '.join(sorted(changed))}; "
                "repeat its settings to resume it, or name another folder with --out"
            )
        directory.mkdir(parents=True, exist_ok=True)
        self._begun = before is not None
        if self._begun:
            self._load()

    def _load(self) -> None:
        """Read what is whole; a line that was cut off by the end of the run is dropped."""
        path = self.directory / _SAMPLES
        if not path.exists():
            return
        kept = []
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
            try:
                record = Record.from_dict(json.loads(line))
            except (ValueError, TypeError):
                break
            if not line.endswith("\n"):
                break
            self.records[record.id] = record
            kept.append(line)
        _replace(path, "".join(kept))

    def add(self, records: Iterable[Record]) -> None:
        """Keep the records of a batch, whatever happens next."""
        records = list(records)
        if not self._begun:
            (self.directory / _SAMPLES).unlink(missing_ok=True)
            self.write(_RUN, self._settings)
            self._begun = True
        with (self.directory / _SAMPLES).open("a", encoding="utf-8") as file:
            file.write("".join(_line(record) for record in records))
            file.flush()
            os.fsync(file.fileno())
        self.records |= {record.id: record for record in records}

    def sort(self, ids: Iterable[str]) -> None:
        """Put the records in this order."""
        self.records = {name: self.records[name] for name in ids if name in self.records}
        lines = [_line(record) for record in self.records.values()]
        _replace(self.directory / _SAMPLES, "".join(lines))

    def write(self, name: str, data: Any) -> None:
        _replace(self.directory / name, json.dumps(data, indent=1) + "\n")


def _line(record: Record) -> str:
    return json.dumps(record.to_dict()) + "\n"


def _replace(path: Path, text: str) -> None:
    """Write in one piece."""
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise PureKVError(f"{path} is damaged ({error}); name another folder with --out") from error
