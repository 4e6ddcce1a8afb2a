"""Seeds by name, so that nothing random depends on the order in which things are asked for.

A generator shared by many callers gives each of them numbers that depend on who came first. Here
every random decision names itself instead (`rng(run_seed, "augment", epoch, sample)`): the same
name gives the same numbers on any rank, in any worker, before and after a restart.
"""

from __future__ import annotations

import hashlib

import numpy as np


def named_seed(*parts: int | str) -> int:
    """A number in `[0, 2**63)` that depends on every part, its type and its place.

    Args:
        parts: What the seed is for, e.g. `(run_seed, "shuffle", epoch)`; whole numbers of any size
            and strings.

    Raises:
        TypeError: A part is neither; a float or an object has no one spelling to hash.
    """
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        # Type tag and length before the bytes: without them ("ab", "c") and ("a", "bc"), or 1 and
        # "1", would share a seed.
        if isinstance(part, str):
            tag, data = b"s", part.encode("utf-8", "surrogatepass")
        elif isinstance(part, (int, np.integer)) and not isinstance(part, bool):
            tag, data = b"i", b"%d" % int(part)
        else:
            raise TypeError(
                f"a part of a seed must be int or str, not {type(part).__name__}: {part!r}"
            )
        digest.update(tag + b"%d:" % len(data) + data)
    return int.from_bytes(digest.digest(), "big") >> 1  # fits a signed 64-bit tensor


def rng(*parts: int | str) -> np.random.Generator:
    """A generator of its own for what `parts` name; see `named_seed`."""
    return np.random.Generator(np.random.PCG64(named_seed(*parts)))
