"""Text for a terminal: tables, amounts with units, and text of others made harmless."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence


def table(headings: Sequence[str], rows: Sequence[Sequence[object]], *, left: int = 1) -> str:
    """Rows in columns; the first `left` columns begin at the left, the others (numbers) end at the right.

    Whole numbers get thousands separators.
    """
    cells = [[f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row] for row in (headings, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(headings))]
    lines = [
        "  ".join(text.ljust(width) if column < left else text.rjust(width)
                  for column, (text, width) in enumerate(zip(row, widths, strict=True))).rstrip()
        for row in cells
    ]  # fmt: skip
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def bytes_text(count: float) -> str:
    """`4.2 MiB`."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if count < 1024 or unit == "TiB":
            break
        count /= 1024
    return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"


def harmless(text: str, *, lines: bool = False) -> str:
    r"""Text of others with every control or formatting character spelt out (`\x1b`).

    Such characters could move the cursor, retitle the window or turn the direction of writing.

    Args:
        text: Anything.
        lines: Keep line ends.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        char if (lines and char == "\n") or unicodedata.category(char) not in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")
        else char.encode("unicode_escape").decode()
        for char in text
    )


def shortened(text: str, limit: int) -> str:
    """At most `limit` characters; what is left out is counted."""
    if len(text) <= limit:
        return text
    return f"{text[:limit]} … ({len(text) - limit:,} more characters)"
