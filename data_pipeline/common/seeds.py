"""Random seeds derived from names, so that results do not depend on the order of calls.

With one shared generator, each caller's numbers depend on how many were drawn before. Here every
random decision has a name instead (`rng(run_seed, "augment", epoch, sample)`): the same name gives
the same numbers on any rank, in any worker, before and after a restart.
"""

from __future__ import annotations

import hashlib

import numpy as np


def named_seed(*parts: int | str) -> int:
    """A seed in `[0, 2**63)` that depends on the value, type and order of all parts.

    Args:
        parts: What the seed is for, e.g. `(run_seed, "shuffle", epoch)`; integers of any size and
            strings.

    Raises:
        TypeError: A part is neither; floats and objects have no unique byte representation.
    """
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        # Type tag and length before the bytes: without them ("ab", "c") and ("a", "bc"), or 1 and
        # "1", would give the same seed.
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
    """A new generator seeded with `named_seed(*parts)`."""
    return np.random.Generator(np.random.PCG64(named_seed(*parts)))
