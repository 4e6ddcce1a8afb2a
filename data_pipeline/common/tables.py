"""Tables of text with aligned columns: for terminals, and as Markdown."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence


def format_table(
    header: Sequence[str],
    rows: Sequence[Sequence[object]],
    *,
    align: str = "lr",
    rule: bool = True,
) -> str:
    """Rows in aligned columns, two spaces apart.

    Args:
        header: Name of each column.
        rows: Cells; integers get thousands separators.
        align: `l` or `r` for each column; the last letter also applies to all further columns.
        rule: Underline the header.
    """
    cells = [[format_count(cell) for cell in row] for row in (header, *rows)]
    widths = _widths(cells)
    lines = ["  ".join(_align(row, widths, align)).rstrip() for row in cells]
    if rule:
        lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def markdown_table(
    header: Sequence[str], rows: Sequence[Sequence[object]], *, align: str = "lr"
) -> str:
    """A Markdown table that is also readable as plain text; for arguments see `format_table`."""
    cells = [[_escape(format_count(cell)) for cell in row] for row in (header, *rows)]
    widths = _widths(cells)
    separator = [
        "-" * width if _is_left(column, align) else "-" * (width - 1) + ":"
        for column, width in enumerate(widths)
    ]
    lines = [_align(row, widths, align) for row in cells]
    lines.insert(1, separator)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def format_count(value: object) -> str:
    """A value as text; integers get thousands separators."""
    return f"{value:,}" if isinstance(value, int) else str(value)


def _widths(cells: Sequence[Sequence[str]]) -> list[int]:
    return [max(map(_width, column)) for column in zip(*cells, strict=True)]


def _align(row: Sequence[str], widths: Sequence[int], align: str) -> list[str]:
    aligned = []
    for column, (text, width) in enumerate(zip(row, widths, strict=True)):
        padding = " " * (width - _width(text))
        aligned.append(text + padding if _is_left(column, align) else padding + text)
    return aligned


def _is_left(column: int, align: str) -> bool:
    return align[min(column, len(align) - 1)] == "l"


def _width(text: str) -> int:
    """Width in a terminal, columns."""
    return sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in text)


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
