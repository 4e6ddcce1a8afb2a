"""Pairs of 64-bit hashes within a small Hamming distance, without comparing all pairs.

If two hashes differ in at most d bits and are split into d + 1 bands, at least one band is equal in
both (pigeonhole principle). The hashes are sorted by each band in turn, and only hashes with an
equal band are compared.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

MAX_DISTANCE = 15
_BLOCK_PAIRS = 1 << 22
"""Comparisons per block: 32 MiB of XORed hashes."""
_POPCOUNT = np.array([bin(value).count("1") for value in range(1 << 16)], np.uint8)


def pairs_within(hashes: np.ndarray, distance: int) -> np.ndarray:
    """Every pair of hashes within a Hamming distance.

    Args:
        hashes: uint64 `[n]`, without duplicates.
        distance: Maximum number of differing bits, 0 to 15.

    Returns:
        int64 `[pairs, 2]`: indices into `hashes`, the smaller one first; sorted, without
        duplicates.
    """
    assert 0 <= distance <= MAX_DISTANCE
    edges = [64 * band // (distance + 1) for band in range(distance + 2)]
    pairs = [np.empty((0, 2), np.int64)]
    for low, high in pairwise(edges):
        mask = np.uint64((1 << (high - low)) - 1)
        bands = hashes >> np.uint64(low) & mask
        order = np.argsort(bands, kind="stable")
        starts = np.flatnonzero(np.diff(bands[order], prepend=bands[order][:1] ^ np.uint64(1)))
        ends = np.append(starts[1:], len(order))
        for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
            if end - start > 1:
                pairs += _compare_all(hashes, order[start:end], distance)

    return np.unique(np.concatenate(pairs), axis=0)


def popcount(values: np.ndarray) -> np.ndarray:
    """Number of set bits of each uint64, as uint8 of the same shape."""
    if hasattr(np, "bitwise_count"):
        counts: np.ndarray = np.bitwise_count(values)
        return counts
    words = np.ascontiguousarray(values).view(np.uint16).reshape(*values.shape, 4)
    sums: np.ndarray = _POPCOUNT[words].sum(axis=-1, dtype=np.uint8)
    return sums


def _compare_all(hashes: np.ndarray, indices: np.ndarray, distance: int) -> list[np.ndarray]:
    """Pairs of `indices` whose hashes are within the distance; compares all pairs, in blocks."""
    indices = np.sort(indices)
    values, pairs = hashes[indices], []
    step = max(1, _BLOCK_PAIRS // len(indices))
    for first in range(0, len(indices), step):
        rows = values[first : first + step]
        is_near = popcount(rows[:, None] ^ values[None, first:]) <= distance
        i, j = np.nonzero(np.triu(is_near, k=1))
        if len(i):
            block = np.stack([indices[first + i], indices[first + j]], axis=1)
            pairs.append(block.astype(np.int64))

    return pairs


def representatives(count: int, pairs: np.ndarray, protected: np.ndarray) -> np.ndarray:
    """Greedy selection: each item, in order, is kept unless it is near an earlier kept one.

    Every dropped item is therefore near a kept one; chains of small differences do not merge
    distant items.

    Args:
        count: Number of items.
        pairs: int64 `[pairs, 2]`, which items are near each other; the smaller index first.
        protected: bool `[count]`, items that are always kept.

    Returns:
        int64 `[count]`: the kept item that represents each; the item itself if it is kept.
    """
    representative = np.arange(count, dtype=np.int64)
    order = np.argsort(pairs[:, 1], kind="stable")
    for row in order.tolist():
        earlier, later = int(pairs[row, 0]), int(pairs[row, 1])
        is_kept = representative[earlier] == earlier and representative[later] == later
        if is_kept and not protected[later]:
            representative[later] = earlier

    return representative
