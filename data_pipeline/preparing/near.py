"""Which 64-bit hashes differ in a few bits only, without comparing each with each.

If two hashes differ in at most d bits and are cut into d + 1 bands, at least one band is equal in
both. So hashes are sorted by each band in turn, and only those that share it are compared.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

MAX_DISTANCE = 15
_BLOCK_PAIRS = 1 << 22
"""Comparisons at a time: 32 MiB."""
_POPCOUNT = np.array([bin(value).count("1") for value in range(1 << 16)], np.uint8)


def near_pairs(hashes: np.ndarray, distance: int) -> np.ndarray:
    """Every pair of different hashes within a distance.

    Args:
        hashes: uint64 `[n]`, each once.
        distance: Most bits in which they may differ, 0 to 15.

    Returns:
        int64 `[pairs, 2]`: places in `hashes`, the smaller first; sorted, each pair once.
    """
    assert 0 <= distance <= MAX_DISTANCE
    edges = [64 * band // (distance + 1) for band in range(distance + 2)]
    found = [np.empty((0, 2), np.int64)]
    for low, high in pairwise(edges):
        mask = np.uint64((1 << (high - low)) - 1)
        values = hashes >> np.uint64(low) & mask
        order = np.argsort(values, kind="stable")
        starts = np.flatnonzero(np.diff(values[order], prepend=values[order][:1] ^ np.uint64(1)))
        ends = np.append(starts[1:], len(order))
        for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
            if end - start > 1:
                found += _within(hashes, order[start:end], distance)
    return np.unique(np.concatenate(found), axis=0)


def bits_set(values: np.ndarray) -> np.ndarray:
    """How many bits of each uint64 are set, uint8 of the same shape."""
    if hasattr(np, "bitwise_count"):
        counted: np.ndarray = np.bitwise_count(values)
        return counted
    words = np.ascontiguousarray(values).view(np.uint16).reshape(*values.shape, 4)
    summed: np.ndarray = _POPCOUNT[words].sum(axis=-1, dtype=np.uint8)
    return summed


def _within(hashes: np.ndarray, places: np.ndarray, distance: int) -> list[np.ndarray]:
    """The near pairs among some hashes, by comparing each with each, a block at a time."""
    places = np.sort(places)
    values, found = hashes[places], []
    step = max(1, _BLOCK_PAIRS // len(places))
    for first in range(0, len(places), step):
        rows = values[first : first + step]
        near = bits_set(rows[:, None] ^ values[None, first:]) <= distance
        i, j = np.nonzero(np.triu(near, k=1))
        if len(i):
            found.append(np.stack([places[first + i], places[first + j]], axis=1).astype(np.int64))
    return found


def leaders(count: int, pairs: np.ndarray, free: np.ndarray) -> np.ndarray:
    """Who is kept, and for whom the others go: each in order is kept unless an earlier kept one is
    near.

    So everything dropped is near to something kept; chains of small differences do not join what is
    far apart.

    Args:
        count: How many there are.
        pairs: int64 `[pairs, 2]`, who is near to whom; the smaller first.
        free: bool `[count]`, who is kept in any case.

    Returns:
        int64 `[count]`: the kept one that each belongs to; itself if it is kept.
    """
    leader = np.arange(count, dtype=np.int64)
    order = np.argsort(pairs[:, 1], kind="stable")
    for place in order.tolist():
        earlier, later = int(pairs[place, 0]), int(pairs[place, 1])
        if leader[later] == later and leader[earlier] == earlier and not free[later]:
            leader[later] = earlier
    return leader
