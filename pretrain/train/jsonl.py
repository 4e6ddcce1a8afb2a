"""JSON Lines files that a resumed run continues without duplicate steps.

A killed run may have written rows of steps after its last checkpoint, and an incomplete last line.
Opening the file at the step of that checkpoint removes both.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_pipeline.common import storage
from pretrain.train.log_entry import LogEntry

METRICS_FILE = "metrics.jsonl"


class JsonlWriter:
    """Appends JSON objects, one per line; each has a `step`."""

    def __init__(self, path: Path, *, resumed_step: int) -> None:
        """Open `path`, keeping only rows of steps up to `resumed_step`."""
        self.path = path
        self.kept = tuple(_rows_up_to(path, resumed_step))
        storage.write_bytes(str(path), "".join(_line(row) for row in self.kept).encode())
        self._stream = path.open("a", encoding="utf-8")

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one row and flush it."""
        self._stream.write(_line(row))
        self._stream.flush()

    def close(self) -> None:
        """Close the file."""
        self._stream.close()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file, without an incomplete last line."""
    return list(_rows_up_to(path, None))


def read_log(path: Path) -> list[LogEntry]:
    """The entries of a metrics.jsonl; empty if there is no file.

    Raises:
        DataError: A row was written by another version of this program.
    """
    return [LogEntry.from_row(row) for row in read_rows(path)]


def _rows_up_to(path: Path, last_step: int | None) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    if not path.exists():
        return rows
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            row = json.loads(line)
        except ValueError:
            continue  # an incomplete line, from a kill or a full disk
        if isinstance(row, dict) and (last_step is None or row.get("step", 0) <= last_step):
            rows.append(row)
    return rows


def _line(row: Mapping[str, Any]) -> str:
    # NaN and infinity are not valid JSON, so they are written as strings.
    values = {key: _json_value(value) for key, value in row.items()}
    return json.dumps(values, ensure_ascii=False) + "\n"


def _json_value(value: Any) -> Any:
    if isinstance(value, float) and value - value != 0:
        return str(value)
    if isinstance(value, list):
        return [_json_value(item) for item in value]
    return value
