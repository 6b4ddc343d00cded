"""What the requests of an evaluation kept, in sum and one by one."""

import json
from pathlib import Path
from typing import Any

from purekv.config import PureKVConfig
from purekv.report import Report


class Record:
    """Sums of all requests (calls of `generate`, a batch each) since `restart`; with a path, a JSON
    line for each.

    The first line is `{"config": ...}`, the others are reports, or `null` for a request that ran
    without PureKV.
    """

    def __init__(self, config: PureKVConfig, path: Path | None = None) -> None:
        self._path = path
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"config": config.to_dict()}) + "\n")
        self.restart()

    def restart(self) -> None:
        self.requests = self.uncompressed = 0
        self._visual = self._kept = self._bytes_full = self._bytes_kept = 0

    def add(self, report: Report | None) -> None:
        self.requests += 1
        if report is None:
            self.uncompressed += 1
        else:
            self._visual += sum(report.visual_tokens)
            self._kept += sum(report.kept_visual_tokens)
            self._bytes_full += report.kv_bytes_full
            self._bytes_kept += report.kv_bytes_kept
        if self._path is not None:
            with self._path.open("a") as file:
                file.write(json.dumps(report and report.to_dict()) + "\n")

    def summary(self) -> dict[str, Any]:
        """Numbers by name; shares are of the requests that PureKV compressed."""
        found: dict[str, Any] = {
            "purekv_requests": self.requests,
            "purekv_uncompressed_requests": self.uncompressed,
        }
        if self._bytes_kept:
            found["purekv_visual_tokens_kept"] = self._kept / self._visual
            found["purekv_compression"] = self._bytes_full / self._bytes_kept
        return found
