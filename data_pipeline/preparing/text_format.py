"""Text output for a terminal: tables, byte counts and truncated text."""

from __future__ import annotations

from collections.abc import Sequence


def format_table(
    headings: Sequence[str], rows: Sequence[Sequence[object]], *, left: int = 1
) -> str:
    """Rows in aligned columns: the first `left` columns left-aligned, the others right-aligned.

    Integers get thousands separators.
    """
    cells = [[format_count(cell) for cell in row] for row in (headings, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(headings))]

    lines = []
    for row in cells:
        aligned = [
            text.ljust(width) if column < left else text.rjust(width)
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(aligned).rstrip())

    rule = "  ".join("-" * width for width in widths)
    return "\n".join([lines[0], rule, *lines[1:]])


def format_count(value: object) -> str:
    """A value as text; integers get thousands separators."""
    return f"{value:,}" if isinstance(value, int) else str(value)


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
    return f"{text[:limit]} … ({len(text) - limit:,} more characters)"
