"""Which pictures train, and which are held back to judge by.

Two questions, two sets: drawings in a style never seen (a whole vendor), and concepts never seen
(one in ten, from every vendor, with the icons of the same name). A concept's fate hangs on its code
points alone, so it is the same on every machine and for every vendor.
"""

from __future__ import annotations

import hashlib
from typing import Literal

from tools.quickstart_data.sources import UNSEEN_STYLE

Split = Literal["train", "unseen_style", "unseen_concept"]
SPLITS: tuple[Split, ...] = ("train", "unseen_style", "unseen_concept")


def is_held_out(hexcode: str) -> bool:
    """Whether a concept is kept from training: one in ten by the MD5 of its code points.

    Args:
        hexcode: Upper case, without FE0F; empty for what is no emoji, and that is never held out.
    """
    digest = hashlib.md5(hexcode.encode(), usedforsecurity=False).hexdigest()
    return bool(hexcode) and int(digest, 16) % 10 == 0


def split_of(source: str, hexcode: str) -> Split:
    """The set that a picture of the concept `hexcode` by `source` belongs to."""
    if is_held_out(hexcode):
        return "unseen_concept"
    return "unseen_style" if source == UNSEEN_STYLE else "train"
