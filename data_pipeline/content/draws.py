"""A sample's own random numbers: cheap, and the same wherever and whenever the sample is read.

They are pieces of a BLAKE2b digest of the sample's name (seed, epoch, shard, key), so they depend
on no library's generator, take 2 microseconds, and are there before the picture is decoded. Numbers
for another purpose come from another digest: what is added later does not change what was there.
"""

from __future__ import annotations

import hashlib
import struct

_NUMBERS = struct.Struct("<16I")
_UNIT = 2.0**-32

COUNT = 16
"""Numbers of one digest."""


def draws(purpose: bytes, seed: int, epoch: int, shard: str, key: str) -> list[float]:
    """`COUNT` numbers in `[0, 1)`, multiples of 2^-32.

    Args:
        purpose: What they are for, at most 16 bytes.
        seed: The run's.
        epoch: How often the sample came before.
        shard: Its shard's name.
        key: Its key.
    """
    # Numbers end in a blank and the first text says its length: two samples never spell the same
    # name.
    name = f"{seed} {epoch} {len(shard)} {shard}{key}".encode("utf-8", "surrogatepass")
    digest = hashlib.blake2b(name, digest_size=64, person=purpose).digest()
    return [number * _UNIT for number in _NUMBERS.unpack(digest)]
