from __future__ import annotations

import itertools

import cv2
import numpy as np
import pytest

from data_pipeline.preparing.hamming import pairs_within, popcount, representatives
from data_pipeline.preparing.perceptual_hash import hash_of_pixels, perceptual_hash
from tests.support.photos import jpeg, photo


def distance(a: bytes, b: bytes) -> int:
    first, second = perceptual_hash(a), perceptual_hash(b)
    assert first is not None and second is not None
    return (first ^ second).bit_count()


def test_hash_is_stable_under_common_edits() -> None:
    original = photo(1)
    for edited in (
        jpeg(original, 30),
        jpeg(cv2.resize(original, (97, 81), interpolation=cv2.INTER_AREA)),
        jpeg(cv2.GaussianBlur(original, (5, 5), 0)),
        jpeg(np.clip(original * 0.85 + 12, 0, 255).astype(np.uint8)),
        bytes(cv2.imencode(".png", original)[1]),
        bytes(cv2.imencode(".webp", original)[1]),
    ):
        assert distance(jpeg(original), edited) <= 3


def test_hash_differs_for_other_images() -> None:
    original = photo(1)
    distances = [distance(jpeg(original), jpeg(photo(seed))) for seed in range(2, 40)]
    assert min(distances) > 12 and 24 < np.mean(distances) < 40
    mirrored = original[:, ::-1]
    assert distance(jpeg(original), jpeg(mirrored)) > 12


def test_hash_matches_the_dct_definition() -> None:
    pixels = photo(3, side=32)
    gray = pixels.astype(np.float64) @ [0.299, 0.587, 0.114]
    k, n = np.meshgrid(np.arange(32), np.arange(32), indexing="ij")
    dct = np.cos(np.pi * (2 * n + 1) * k / 64) * np.where(k == 0, 1 / 32, 2 / 32) ** 0.5
    coefficients = (dct @ gray @ dct.T)[:8, :8].reshape(-1)
    median = np.median(coefficients[1:])
    expected = sum(1 << bit for bit, value in enumerate(coefficients) if value > median)
    assert hash_of_pixels(pixels) == expected


def test_uniform_images_have_no_hash() -> None:
    assert perceptual_hash(jpeg(np.full((50, 50, 3), 90, np.uint8))) is None
    transparent = np.dstack([photo(5), np.zeros((200, 200), np.uint8)])
    assert hash_of_pixels(transparent) is None


def test_transparent_areas_count_as_white() -> None:
    rgba = np.dstack([photo(5), np.zeros((200, 200), np.uint8)])
    rgba[50:150, 50:150, 3] = 255
    on_white = np.full((200, 200, 3), 255, np.uint8)
    on_white[50:150, 50:150] = rgba[50:150, 50:150, :3]
    first, second = hash_of_pixels(rgba), hash_of_pixels(on_white)
    assert first is not None and second is not None and (first ^ second).bit_count() <= 2


@pytest.mark.parametrize("limit", [0, 1, 3, 5, 9, 15])
def test_pairs_within_matches_comparing_all(limit: int) -> None:
    rng = np.random.default_rng(limit)
    hashes = rng.integers(0, 2**64, 300, dtype=np.uint64)
    flips = [
        np.uint64(sum(1 << int(bit) for bit in rng.choice(64, count, replace=False)))
        for count in range(17)
    ]
    near = [hashes[:30] ^ flip for flip in flips]
    hashes = rng.permutation(np.unique(np.concatenate([hashes, *near])))

    expected = [
        [i, j]
        for i, j in itertools.combinations(range(len(hashes)), 2)
        if int(hashes[i] ^ hashes[j]).bit_count() <= limit
    ]
    assert pairs_within(hashes, limit).tolist() == expected
    assert len(expected) >= 30 * limit


def test_popcount_without_numpy_2(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).integers(0, 2**64, (7, 5), dtype=np.uint64)
    expected = [[int(value).bit_count() for value in row] for row in values]
    assert popcount(values).tolist() == expected
    monkeypatch.delattr(np, "bitwise_count", raising=False)
    assert popcount(values).tolist() == expected


def test_representatives_of_a_chain() -> None:
    pairs = np.array([[0, 1], [1, 2], [2, 3]])
    assert representatives(4, pairs, np.zeros(4, bool)).tolist() == [0, 0, 2, 2]
    protected = np.array([False, False, False, True])
    assert representatives(4, pairs, protected).tolist() == [0, 0, 2, 3]
