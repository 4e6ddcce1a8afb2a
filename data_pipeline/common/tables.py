"""Text for terminals: tables with aligned columns (also as Markdown), numbers, truncated text."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence

from data_pipeline.common.escaping import escape_control


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
    lines = _aligned_lines(cells, widths, align)
    if rule:
        lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def format_rows(rows: Sequence[Sequence[object]], *, align: str = "l") -> str:
    """A table without a header, such as names and values; for arguments see `format_table`."""
    cells = [[format_count(cell) for cell in row] for row in rows]
    return "\n".join(_aligned_lines(cells, _widths(cells), align))


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
    """A value as text; integers get thousands separators, control characters are escaped."""
    return f"{value:,}" if isinstance(value, int) else escape_control(str(value))


def counted(number: int, singular: str, plural: str = "") -> str:
    """A number with its noun: `1 shard`, `2,000 shards`; `plural` is the singular with `s` unless
    given."""
    return f"{number:,} {singular if number == 1 else plural or singular + 's'}"


def format_bytes(count: float) -> str:
    """A number of bytes with a binary unit, such as `4.2 MiB`."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if count < 1024 or unit == "TiB":
            break
        count /= 1024
    return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"


def truncate(text: str, limit: int) -> str:
    """At most `limit` characters of a text, followed by the number of omitted ones."""
    if len(text) <= limit:
        return text
    return f"{text[:limit]} … ({counted(len(text) - limit, 'more character')})"


def _widths(cells: Sequence[Sequence[str]]) -> list[int]:
    return [max(map(_width, column)) for column in zip(*cells, strict=True)]


def _aligned_lines(cells: Sequence[Sequence[str]], widths: Sequence[int], align: str) -> list[str]:
    return ["  ".join(_align(row, widths, align)).rstrip() for row in cells]


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
    return text.replace("|", "\\|")


def join_counts(counts: Mapping[str, int]) -> str:
    """Counts by name, the largest first: `hidden file 3, no extension 2`."""
    return ", ".join(f"{name} {count:,}" for name, count in Counter(counts).most_common())
