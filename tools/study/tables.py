"""Means with their spread over seeds, and tables in Markdown that also read well in a terminal.
Pure."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class Spread(NamedTuple):
    """A mean over seeds."""

    mean: float
    deviation: float
    """Sample standard deviation; nan for a single value."""
    seeds: int

    def text(self, digits: int = 2, *, signed: bool = False) -> str:
        """`1.23 ± 0.04`; without the second part for a single value, `-` without any."""
        if not self.seeds:
            return "-"
        mean = f"{self.mean:{'+' if signed else ''},.{digits}f}"
        return mean if math.isnan(self.deviation) else f"{mean} ± {self.deviation:,.{digits}f}"


def spread(values: Sequence[float | None]) -> Spread:
    """Mean and deviation; values that are None are left out."""
    known = [value for value in values if value is not None]
    if not known:
        return Spread(math.nan, math.nan, 0)
    mean = sum(known) / len(known)
    if len(known) == 1:
        return Spread(mean, math.nan, 1)
    return Spread(
        mean, math.sqrt(sum((value - mean) ** 2 for value in known) / (len(known) - 1)), len(known)
    )


def paired(first: Sequence[float], second: Sequence[float]) -> Spread:
    """first - second, seed by seed: what both seeds share (the order of the data) drops out."""
    return spread([one - other for one, other in zip(first, second, strict=True)])


def pick(result: Mapping[str, Any] | None, path: Sequence[str]) -> float | None:
    """A number deep in a result, None where there is none."""
    value: Any = result
    for key in path:
        if not isinstance(value, Mapping) or key not in value:
            return None
        value = value[key]
    return None if value is None else float(value)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose columns line up: the first to the left, the others to the right."""
    cells = [[_cell(text) for text in row] for row in (head, *rows)]
    widths = [max(_width(row[column]) for row in cells) for column in range(len(head))]
    lines = []
    for number, row in enumerate(cells):
        padded = [
            text + " " * (width - _width(text))
            if column == 0
            else " " * (width - _width(text)) + text
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append(f"| {' | '.join(padded)} |")
        if number == 0:
            rule = [
                "-" * width if column == 0 else "-" * (width - 1) + ":"
                for column, width in enumerate(widths)
            ]
            lines.append(f"| {' | '.join(rule)} |")
    return "\n".join(lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _width(text: str) -> int:
    """Columns that a terminal shows."""
    return sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in text)
