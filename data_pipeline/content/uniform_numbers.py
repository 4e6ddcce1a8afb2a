"""Reproducible random numbers for each sample.

The numbers are taken from a BLAKE2b digest of (seed, epoch, shard, key). They are the same on every
rank and worker and after a restart, depend on no library's generator, take 2 microseconds, and are
available before the image is decoded. Each purpose has its own digest, so a new random
transformation does not change the numbers of existing ones.
"""

from __future__ import annotations

import hashlib
import struct

_DIGEST = struct.Struct("<16I")
_SCALE = 2.0**-32

NUM_UNIFORMS = 16
"""Numbers per digest."""


def uniform_numbers(purpose: bytes, seed: int, epoch: int, shard: str, key: str) -> list[float]:
    """`NUM_UNIFORMS` numbers in `[0, 1)`, multiples of 2^-32.

    Args:
        purpose: Personalization string of the digest, at most 16 bytes.
        seed: Seed of the run.
        epoch: How often the sample was used before.
        shard: Name of the sample's shard.
        key: Key of the sample.
    """
    # Integers end with a space and the length of `shard` is included, so different arguments never
    # give the same string.
    name = f"{seed} {epoch} {len(shard)} {shard}{key}".encode("utf-8", "surrogatepass")
    digest = hashlib.blake2b(name, digest_size=64, person=purpose).digest()
    return [integer * _SCALE for integer in _DIGEST.unpack(digest)]
