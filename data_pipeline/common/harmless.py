"""Text of others, made harmless for a terminal, a log or a page."""

from __future__ import annotations

import unicodedata


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
        char
        if (lines and char == "\n")
        or unicodedata.category(char) not in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")
        else char.encode("unicode_escape").decode()
        for char in text
    )
