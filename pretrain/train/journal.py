"""A file of JSON lines that a resumed run goes on writing, without any step in it twice.

A run that was killed may have written about steps after its last checkpoint, and half a line.
Opening the journal at the step of that checkpoint removes both.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Journal:
    """Appends one JSON object a line; each has a `step`."""

    def __init__(self, path: Path, *, resumed_step: int) -> None:
        """Open `path`, keeping only rows of steps up to `resumed_step`."""
        self.path = path
        self.kept = tuple(_rows_up_to(path, resumed_step))
        temporary = path.with_name(f".{path.name}.part")
        with temporary.open("w", encoding="utf-8") as stream:
            stream.writelines(_line(row) for row in self.kept)
        os.replace(temporary, path)
        self._stream = path.open("a", encoding="utf-8")

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one row; it is in the file when this returns."""
        self._stream.write(_line(row))
        self._stream.flush()

    def close(self) -> None:
        """Close the file."""
        self._stream.close()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The whole rows of a journal; half a line at the end is left out."""
    return list(_rows_up_to(path, None))


def _rows_up_to(path: Path, last_step: int | None) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    if not path.exists():
        return rows
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            row = json.loads(line)
        except ValueError:
            continue  # half a line, from a kill or a full disk
        if isinstance(row, dict) and (last_step is None or row.get("step", 0) <= last_step):
            rows.append(row)
    return rows


def _line(row: Mapping[str, Any]) -> str:
    # NaN and infinity are no JSON; as text they stay readable for every program and every person.
    return json.dumps({key: _plain(value) for key, value in row.items()}, ensure_ascii=False) + "\n"


def _plain(value: Any) -> Any:
    if isinstance(value, float) and value - value != 0:
        return str(value)
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value
