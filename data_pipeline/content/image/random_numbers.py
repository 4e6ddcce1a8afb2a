"""Reproducible random numbers for each sample.

The numbers are taken from a BLAKE2b digest of (seed, epoch, shard, key). They are the same on every
rank and worker and after a restart, do not depend on a library's random number generator, and are
available before the image is decoded. Computing them takes about 2 microseconds. Each purpose has
its own digest, so adding a random transformation does not change the numbers of existing ones.
"""

from __future__ import annotations

import hashlib
import struct

_SIXTEEN_UINT32 = struct.Struct("<16I")
_SCALE = 2.0**-32

NUM_UNIFORMS = 16
"""Number of random numbers in one digest."""


def uniform_numbers(purpose: bytes, seed: int, epoch: int, shard: str, key: str) -> list[float]:
    """`NUM_UNIFORMS` numbers in `[0, 1)`, multiples of 2^-32.

    Args:
        purpose: What the numbers are used for; the personalization string of the digest, at most
            16 bytes.
        seed: Seed of the run.
        epoch: Number of times that the sample was used before.
        shard: Name of the sample's shard.
        key: Key of the sample.
    """
    # A space follows each integer and the length of `shard` is included, so different arguments
    # never give the same message.
    message = f"{seed} {epoch} {len(shard)} {shard}{key}".encode("utf-8", "surrogatepass")
    digest = hashlib.blake2b(message, digest_size=64, person=purpose).digest()
    return [integer * _SCALE for integer in _SIXTEEN_UINT32.unpack(digest)]
