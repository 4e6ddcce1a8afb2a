"""Escapes untrusted text for a terminal, a log or an HTML page."""

from __future__ import annotations

import unicodedata

_ESCAPED_CATEGORIES = ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")


def escape_control(text: str, *, lines: bool = False) -> str:
    r"""Untrusted text with every control or formatting character escaped (`\x1b`).

    Such characters can move the cursor, change the window title or reverse the text direction.

    Args:
        text: Any text.
        lines: Keep line feeds.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        char
        if (lines and char == "\n") or unicodedata.category(char) not in _ESCAPED_CATEGORIES
        else char.encode("unicode_escape").decode()
        for char in text
    )
