"""Text output for a terminal: byte counts and truncated text."""

from __future__ import annotations


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
