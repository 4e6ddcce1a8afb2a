"""Assigns images to the training set and to two held-out sets.

The held-out sets answer two questions: drawings in an unseen style (all of one vendor), and unseen
concepts (one in ten, of all vendors, including icons of the same name). A concept's split depends
only on its code points, so it is the same on every machine and for every vendor.
"""

from __future__ import annotations

import hashlib
from typing import Literal

from tools.quickstart_data.sources import UNSEEN_STYLE

Split = Literal["train", "unseen_style", "unseen_concept"]
SPLITS: tuple[Split, ...] = ("train", "unseen_style", "unseen_concept")


def is_held_out(hexcode: str) -> bool:
    """Whether a concept is held out: one in ten by the MD5 of its code points.

    Args:
        hexcode: Upper case, without FE0F; empty for a concept without emoji, never held out.
    """
    digest = hashlib.md5(hexcode.encode(), usedforsecurity=False).hexdigest()
    return bool(hexcode) and int(digest, 16) % 10 == 0


def split_of(source: str, hexcode: str) -> Split:
    """The split of an image of the concept `hexcode` from `source`."""
    if is_held_out(hexcode):
        return "unseen_concept"
    return "unseen_style" if source == UNSEEN_STYLE else "train"
