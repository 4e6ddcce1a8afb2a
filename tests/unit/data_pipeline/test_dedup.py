from __future__ import annotations

import itertools
import json
import time
from pathlib import Path

import cv2
import numpy as np
import pytest

from data_pipeline.common.errors import ConfigError
from data_pipeline.order.drop import read_drop_list
from data_pipeline.preparing.dedup import KINDS, find_groups
from data_pipeline.preparing.hashing import HAS_CAPTION, HAS_LOOKS, READABLE, Hashes
from data_pipeline.preparing.near import bits_set, leaders, near_pairs
from data_pipeline.preparing.phash import hash_of_pixels, perceptual_hash
from data_pipeline.shards.writer import write_shards
from tests.support.data_commands import data


def photo(seed: int, side: int = 200) -> np.ndarray:
    """Something with large and small forms; different seeds look different."""
    rng = np.random.default_rng(seed)
    coarse = cv2.resize(
        rng.integers(0, 256, (6, 6, 3), dtype=np.uint8), (side, side), interpolation=cv2.INTER_CUBIC
    )
    return np.clip(coarse + rng.normal(0, 6, coarse.shape), 0, 255).astype(np.uint8)


def jpeg(pixels: np.ndarray, quality: int = 90) -> bytes:
    return bytes(cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, quality])[1])


def distance(a: bytes, b: bytes) -> int:
    first, second = perceptual_hash(a), perceptual_hash(b)
    assert first is not None and second is not None
    return (first ^ second).bit_count()


def test_a_picture_is_known_again_after_what_people_do_to_pictures() -> None:
    original = photo(1)
    for changed in (
        jpeg(original, 30),
        jpeg(cv2.resize(original, (97, 81), interpolation=cv2.INTER_AREA)),
        jpeg(cv2.GaussianBlur(original, (5, 5), 0)),
        jpeg(np.clip(original * 0.85 + 12, 0, 255).astype(np.uint8)),
        bytes(cv2.imencode(".png", original)[1]),
        bytes(cv2.imencode(".webp", original)[1]),
    ):
        assert distance(jpeg(original), changed) <= 3
    others = [distance(jpeg(original), jpeg(photo(seed))) for seed in range(2, 40)]
    assert min(others) > 12 and 24 < np.mean(others) < 40
    assert (
        distance(jpeg(original), jpeg(original[:, ::-1])) > 12
    )  # a mirrored picture is another one


def test_the_hash_is_the_textbook_one() -> None:
    pixels = photo(3, side=32)
    gray = pixels.astype(np.float64) @ [0.299, 0.587, 0.114]
    k, n = np.meshgrid(np.arange(32), np.arange(32), indexing="ij")
    cosines = np.cos(np.pi * (2 * n + 1) * k / 64) * np.where(k == 0, 1 / 32, 2 / 32) ** 0.5
    waves = (cosines @ gray @ cosines.T)[:8, :8].reshape(-1)
    expected = sum(1 << bit for bit, wave in enumerate(waves) if wave > np.median(waves[1:]))
    assert hash_of_pixels(pixels) == expected


def test_pictures_of_one_color_have_no_hash_and_transparency_is_white() -> None:
    assert perceptual_hash(jpeg(np.full((50, 50, 3), 90, np.uint8))) is None
    drawn = np.dstack([photo(5), np.zeros((200, 200), np.uint8)])
    assert hash_of_pixels(drawn) is None
    drawn[50:150, 50:150, 3] = 255
    on_white = np.full((200, 200, 3), 255, np.uint8)
    on_white[50:150, 50:150] = drawn[50:150, 50:150, :3]
    first, second = hash_of_pixels(drawn), hash_of_pixels(on_white)
    assert first is not None and second is not None and (first ^ second).bit_count() <= 2


@pytest.mark.parametrize("limit", [0, 1, 3, 5, 9, 15])
def test_near_pairs_are_those_of_comparing_all(limit: int) -> None:
    rng = np.random.default_rng(limit)
    hashes = rng.integers(0, 2**64, 300, dtype=np.uint64)
    flips = [
        np.uint64(sum(1 << int(bit) for bit in rng.choice(64, count, replace=False)))
        for count in range(17)
    ]
    hashes = rng.permutation(
        np.unique(np.concatenate([hashes, *(hashes[:30] ^ flip for flip in flips)]))
    )
    expected = [
        (i, j)
        for i, j in itertools.combinations(range(len(hashes)), 2)
        if int(hashes[i] ^ hashes[j]).bit_count() <= limit
    ]
    assert near_pairs(hashes, limit).tolist() == [list(pair) for pair in expected]
    assert len(expected) >= 30 * limit


def test_bits_are_counted_without_numpy_2(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).integers(0, 2**64, (7, 5), dtype=np.uint64)
    expected = [[int(value).bit_count() for value in row] for row in values]
    assert bits_set(values).tolist() == expected
    monkeypatch.delattr(np, "bitwise_count", raising=False)
    assert bits_set(values).tolist() == expected


def test_who_is_dropped_is_near_to_who_is_kept() -> None:
    # A chain: 0 - 1 - 2 - 3, and 3 is in any case kept.
    pairs = np.array([[0, 1], [1, 2], [2, 3]])
    assert leaders(4, pairs, np.zeros(4, bool)).tolist() == [0, 0, 2, 2]
    assert leaders(4, pairs, np.array([False, False, False, True])).tolist() == [0, 0, 2, 3]


def many_hashes(count: int) -> Hashes:
    rng = np.random.default_rng(0)
    looks = rng.integers(0, 2**64, count, dtype=np.uint64)
    looks[count // 2 :: 10] = looks[: len(looks[count // 2 :: 10])] ^ np.uint64(0b11)
    numbers = np.arange(count)
    flags = np.full(count, READABLE | HAS_LOOKS | HAS_CAPTION, np.uint64)
    return Hashes(
        dataset=numbers * 0,
        shard=numbers // 1000,
        sample=numbers % 1000,
        contents=looks + np.uint64(1),
        looks=looks,
        caption=rng.integers(0, 2**63, count).astype(np.uint64),
        flags=flags,
    )


def test_a_hundred_thousand_pictures_are_compared_in_seconds() -> None:
    hashes = many_hashes(100_000)
    started = time.process_time()
    groups = find_groups(hashes, "near", distance=3)
    assert (
        time.process_time() - started < 20
    )  # about one on a quiet machine; all pairs would take minutes
    assert len(groups.dropped) == 5_000
    assert groups.leader[50_000] == 0


def make_sets(folder: Path) -> None:
    """`train`: 8 samples of which some are alike; `test`: one of its pictures, smaller, and
    another."""
    a, b, c = photo(1), photo(2), photo(3)
    flat = jpeg(np.full((40, 40, 3), 200, np.uint8))
    other_flat = jpeg(np.full((40, 40, 3), 10, np.uint8))
    rows = [
        (jpeg(a), "a tree"),
        (jpeg(b), "a house"),
        (jpeg(a), "A  tree"),
        (jpeg(a, 40), "a trunk"),
        (flat, "grey"),
        (other_flat, "black"),
        (b"broken", "a house"),
        (jpeg(c), "a house"),
    ]
    write_shards(
        [{"__key__": f"{n}", "jpg": p, "txt": t} for n, (p, t) in enumerate(rows)],
        folder / "train",
        samples_per_shard=3,
    )
    write_shards(
        [
            {"__key__": "x", "jpg": jpeg(cv2.resize(b, (120, 120))), "txt": "held out"},
            {"__key__": "y", "jpg": jpeg(photo(9)), "txt": "nothing"},
        ],
        folder / "test",
    )


def dropped(path: Path) -> dict[str, tuple[int, ...]]:
    return {name: row.samples for name, row in read_drop_list(str(path)).shards.items()}


def test_each_kind_of_likeness(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_sets(tmp_path)
    found = {}
    for kind in KINDS:
        data(
            "dedup",
            tmp_path / "train",
            "--by",
            kind,
            "--drop-list",
            tmp_path / kind,
            "--workers",
            0,
        )
        found[kind] = dropped(tmp_path / kind)
    assert found == {
        "exact": {"shard-000000.tar": (2,)},
        "near": {"shard-000000.tar": (2,), "shard-000001.tar": (0,)},
        "caption": {"shard-000000.tar": (2,), "shard-000002.tar": (1,)},
        "pair": {"shard-000000.tar": (2,)},
    }
    said = capsys.readouterr().out
    assert "8 samples, 1 of them unreadable and left alone" in said
    assert next(line.split() for line in said.splitlines() if line.startswith("near")) == [
        "near",
        "1",
        "3",
        "2",
    ]


def test_held_out_pictures_are_taken_out_of_training_and_never_the_other_way(
    tmp_path: Path,
) -> None:
    make_sets(tmp_path)
    data(
        "dedup",
        tmp_path / "train",
        "--against",
        tmp_path / "test",
        "--drop-list",
        tmp_path / "d.json",
        "--workers",
        0,
    )
    assert dropped(tmp_path / "d.json") == {"shard-000000.tar": (1, 2), "shard-000001.tar": (0,)}
    # Several datasets get a list each, and the first of them keeps the picture.
    data(
        "dedup",
        tmp_path / "test",
        tmp_path / "train",
        "--drop-list",
        tmp_path / "e.json",
        "--workers",
        0,
    )
    assert dropped(tmp_path / "e-0.json") == {}
    assert dropped(tmp_path / "e-1.json") == dropped(tmp_path / "d.json")


def test_groups_are_shown_without_letting_captions_write_the_page(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>\u202e<img src=x>"
    write_shards(
        [{"__key__": f"{n}", "jpg": jpeg(photo(1)), "txt": evil} for n in range(10)], tmp_path / "s"
    )
    data(
        "dedup",
        tmp_path / "s",
        "--html",
        tmp_path / "g.html",
        "--json",
        tmp_path / "g.json",
        "--workers",
        0,
    )
    page = (tmp_path / "g.html").read_text()
    assert "<script" not in page and "<img src=x" not in page and "\u202e" not in page
    assert "&lt;script&gt;" in page and "and 2 more" in page
    assert page.count("data:image/jpeg;base64,") == 8
    assert "http" not in page.replace("http-equiv", "")
    groups = json.loads((tmp_path / "g.json").read_text())["groups"]
    assert [[row["sample"] for row in group] for group in groups] == [list(range(10))]


def test_hashes_of_parts_are_used_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_sets(tmp_path)
    line = (
        "dedup",
        tmp_path / "train",
        "--work",
        tmp_path / "work",
        "--workers",
        0,
        "--drop-list",
        tmp_path / "d",
    )
    for part in range(2):
        data(*line, "--part", f"{part}/2")
    assert not (tmp_path / "d").exists()
    for shard in (tmp_path / "train").glob("*.tar"):
        shard.unlink()
    data(*line)
    assert dropped(tmp_path / "d") == {"shard-000000.tar": (2,), "shard-000001.tar": (0,)}
    with pytest.raises(ConfigError, match=r"--distance 16: must lie in 0\.\.15"):
        data(*line, "--distance", 16)
