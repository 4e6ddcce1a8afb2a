"""Damaged shards: none looks like a whole one, none loses a sample without a word, no file crashes
the reader.

The oracle is the shard before it was damaged: what is read must be exactly that, or be named.
"""

from __future__ import annotations

import random
import tracemalloc
import zlib
from collections.abc import Callable
from typing import NamedTuple

import pytest

from data_pipeline.common.errors import DataError
from data_pipeline.shards.scan import scan
from data_pipeline.shards.shard_index import ShardIndex
from data_pipeline.shards.tar import BLOCK
from tests.unit.data_pipeline.test_tar import archive, with_checksum

COUNT = 100


class Whole(NamedTuple):
    """A shard in memory, and all that is true about it."""

    data: bytes
    index: ShardIndex
    samples: list[dict[str, bytes]]
    headers: list[int]
    """First byte of every member's header; two a sample."""


def scanned(data: bytes, *, piece: int = 4096, salvage: bool = False) -> ShardIndex:
    pieces = (data[start : start + piece] for start in range(0, len(data), piece))
    return scan(pieces, len(data), "x.tar", salvage=salvage)


@pytest.fixture(scope="module")
def whole() -> Whole:
    draw = random.Random(5)
    samples = [
        {"jpg": draw.randbytes(draw.randrange(1, 1500)), "txt": f"caption {i}".encode()}
        for i in range(COUNT)
    ]
    data = archive(
        {
            f"{i:03d}.{name}": body
            for i, sample in enumerate(samples)
            for name, body in sample.items()
        }
    )
    index = scanned(data)
    headers = [
        int(index.offsets[i]) + member.start - BLOCK
        for i in range(COUNT)
        for member in index.members(i)
    ]
    return Whole(data, index, samples, headers)


def read_by_index(index: ShardIndex, data: bytes) -> list[dict[str, bytes] | None]:
    """What a reader with the index gets: the samples, and None for those that it reports."""
    found: list[dict[str, bytes] | None] = []
    for i in range(len(index)):
        offset, extent = int(index.offsets[i]), int(index.extents[i])
        piece = data[offset : offset + extent]
        good = len(piece) == extent and zlib.crc32(piece) == index.crc32[i]
        found.append(
            {m.extension: piece[m.start : m.start + m.size] for m in index.members(i)}
            if good
            else None
        )
    return found


Fault = Callable[[bytearray, Whole], None]


def cut(at: Callable[[Whole], int]) -> Fault:
    def fault(data: bytearray, whole: Whole) -> None:
        del data[at(whole) :]

    return fault


def flip(at: Callable[[Whole], int]) -> Fault:
    def fault(data: bytearray, whole: Whole) -> None:
        data[at(whole)] ^= 0x10

    return fault


def zero(at: Callable[[Whole], int], blocks: int) -> Fault:
    def fault(data: bytearray, whole: Whole) -> None:
        start = at(whole)
        data[start : start + blocks * BLOCK] = bytes(blocks * BLOCK)

    return fault


def size_of_everything(data: bytearray, whole: Whole) -> None:
    header = data[whole.headers[100] : whole.headers[100] + BLOCK]
    header[124:136] = b"77777777777\0"
    data[whole.headers[100] : whole.headers[100] + BLOCK] = with_checksum(header)


def swap_blocks(data: bytearray, whole: Whole) -> None:
    first, second = whole.headers[100], whole.headers[100] + BLOCK
    data[first : first + 2 * BLOCK] = data[second : second + BLOCK] + data[first : first + BLOCK]


def lose_a_block(data: bytearray, whole: Whole) -> None:
    del data[whole.headers[100] + BLOCK : whole.headers[100] + 2 * BLOCK]


STRUCTURE: dict[str, tuple[Fault, int]] = {
    "cut at a sample": (cut(lambda w: w.headers[100]), 50),
    "cut at a member": (cut(lambda w: w.headers[101]), 50),
    "cut in a header": (cut(lambda w: w.headers[100] + 77), 50),
    "cut in data": (cut(lambda w: w.headers[100] + BLOCK + 1), 50),
    "cut before the end mark": (cut(lambda w: w.headers[-1] + 2 * BLOCK), 100),
    "cut to nothing": (cut(lambda w: 0), 0),
    "a bit in a checksum": (flip(lambda w: w.headers[100] + 150), 99),
    "a bit in a name": (flip(lambda w: w.headers[100] + 1), 99),
    "a bit in a size": (flip(lambda w: w.headers[100] + 130), 99),
    "a bit in the type": (flip(lambda w: w.headers[101] + 156), 99),
    "a zeroed block": (zero(lambda w: w.headers[100], 1), 99),
    "two zeroed blocks": (zero(lambda w: w.headers[100], 2), 99),
    "many zeroed blocks": (zero(lambda w: w.headers[100], 20), -1),
    "a size beyond the end": (size_of_everything, 50),
    "two blocks swapped": (swap_blocks, 99),
    "a block lost": (lose_a_block, -1),
}
"""Faults of the archive's structure, with the number of samples that salvage keeps (-1: not the
same for all)."""


@pytest.mark.parametrize("name", STRUCTURE)
def test_a_damaged_structure_is_an_error(whole: Whole, name: str) -> None:
    data = bytearray(whole.data)
    STRUCTURE[name][0](data, whole)
    with pytest.raises(DataError, match=r"^x\.tar") as error:
        scanned(bytes(data))
    assert error.value.slug == (
        "truncated" if name.startswith("cut") or "beyond" in name else "bad-tar"
    )


@pytest.mark.parametrize("name", STRUCTURE)
def test_what_a_damaged_shard_still_holds_is_saved(whole: Whole, name: str) -> None:
    data = bytearray(whole.data)
    STRUCTURE[name][0](data, whole)
    saved = scanned(bytes(data), salvage=True)
    kept = dict(zip(saved.keys, read_by_index(saved, bytes(data)), strict=True))
    assert saved.damage
    assert len(saved) == STRUCTURE[name][1] or (STRUCTURE[name][1] < 0 and len(saved) >= 90)
    if (
        name != "a block lost"
    ):  # there the picture has lost bytes, which nothing in a tar could tell
        assert all(kept[key] == whole.samples[int(key)] for key in kept)


@pytest.mark.parametrize("name", STRUCTURE)
def test_with_its_index_every_other_sample_is_read(whole: Whole, name: str) -> None:
    data = bytearray(whole.data)
    STRUCTURE[name][0](data, whole)
    found = read_by_index(whole.index, bytes(data))
    assert all(sample in (None, true) for sample, true in zip(found, whole.samples, strict=True))
    unchanged = whole.data.startswith(bytes(data)) and len(data) >= whole.headers[-1] + 2 * BLOCK
    assert (None in found) != unchanged
    assert found[:50] == whole.samples[:50] or name == "cut to nothing"


@pytest.mark.parametrize("count", [200, pytest.param(4_000, marks=pytest.mark.long)])
def test_salvage_keeps_exactly_the_samples_whose_headers_are_whole(
    whole: Whole, count: int
) -> None:
    draw = random.Random(count)
    for _ in range(count):
        data, hit = bytearray(whole.data), draw.sample(range(2 * COUNT), draw.randrange(1, 6))
        for member in hit:
            data[whole.headers[member] + draw.choice([0, 2, 110, 140, 149, 156])] ^= 0x04
        saved = scanned(bytes(data), salvage=True)
        lost = {f"{member // 2:03d}" for member in hit}
        assert saved.keys == [f"{i:03d}" for i in range(COUNT) if f"{i:03d}" not in lost]
        assert read_by_index(saved, bytes(data)) == [whole.samples[int(key)] for key in saved.keys]


@pytest.mark.parametrize("rounds", [1000, pytest.param(15_000, marks=pytest.mark.long)])
def test_flipped_bits(whole: Whole, rounds: int) -> None:
    """0 undetected corruptions: the sample in which a bit flipped is reported, and no other."""
    draw, ends = random.Random(rounds), whole.index.offsets + whole.index.extents
    for _ in range(rounds):
        place, data = draw.randrange(len(whole.data)), bytearray(whole.data)
        data[place] ^= 1 << draw.randrange(8)
        hit = [i for i in range(COUNT) if whole.index.offsets[i] <= place < ends[i]]
        found = read_by_index(whole.index, bytes(data))
        assert [i for i in range(COUNT) if found[i] is None] == hit
        assert all(found[i] == whole.samples[i] for i in range(COUNT) if i not in hit)


@pytest.mark.parametrize("rounds", [1000, pytest.param(15_000, marks=pytest.mark.long)])
def test_truncations(whole: Whole, rounds: int) -> None:
    """0 silent losses: what is beyond the cut is reported, and the strict walk refuses the
    shard."""
    draw, ends = random.Random(rounds), whole.index.offsets + whole.index.extents
    for _ in range(rounds):
        length = draw.randrange(len(whole.data))
        found = read_by_index(whole.index, whole.data[:length])
        assert [sample is None for sample in found] == [int(end) > length for end in ends]
        assert all(
            sample in (None, true) for sample, true in zip(found, whole.samples, strict=True)
        )
        if length <= ends[-1]:
            with pytest.raises(DataError):
                scanned(whole.data[:length], piece=1 << 20)


def test_a_flipped_bit_in_a_header_is_an_error_or_changes_nothing(whole: Whole) -> None:
    small = archive({"0.jpg": b"x" * 600, "0.txt": b"t", "1.jpg": b"y", "1.txt": b"u"})
    true = scanned(small)
    harmless = 0
    for header in (0, 1536, 2560):
        for bit in range(8 * BLOCK):
            data = bytearray(small)
            data[header + bit // 8] ^= 1 << bit % 8
            try:
                found = scanned(bytes(data))
            except DataError:
                continue
            harmless += 1
            assert found.keys == true.keys
            assert [found.members(i) for i in range(2)] == [true.members(i) for i in range(2)]
    assert harmless < 40  # blanks and zeros around a checksum


def damage(whole: bytes, draw: random.Random) -> bytes:
    data = bytearray(whole)
    for _ in range(draw.randrange(1, 4)):
        start = draw.randrange(len(data))
        match draw.randrange(6):
            case 0:
                data[start] ^= 1 << draw.randrange(8)
            case 1:
                data[start : start + draw.randrange(2000)] = draw.randbytes(draw.randrange(2000))
            case 2:
                del data[start + 1 :]
            case 3:
                block = start // BLOCK * BLOCK
                data[block : block + BLOCK] = with_checksum(
                    bytearray(
                        draw.randbytes(124)
                        + b"%011o\0" % draw.randrange(8**11)
                        + draw.randbytes(376)
                    )
                )
            case 4:
                block = start // BLOCK * BLOCK  # a right header with a strange type or size
                header = data[block : block + BLOCK]
                header[124:136] = draw.choice(
                    [b"%011o\0" % draw.randrange(5000), b"\x80" + draw.randbytes(11)]
                )
                header[156:157] = draw.choice([b"L", b"x", b"g", b"5", b"2", b"0", b"S"])
                if len(header) == BLOCK:
                    data[block : block + BLOCK] = with_checksum(header)
            case 5:
                data[start:start] = bytes(draw.randrange(4) * BLOCK)
    return bytes(data)


@pytest.mark.parametrize("rounds", [1500, pytest.param(30_000, marks=pytest.mark.long)])
def test_no_archive_crashes_the_walk(whole: Whole, rounds: int) -> None:
    small = archive(
        {f"{i}.{name}": bytes([i]) * 300 for i in range(6) for name in ("jpg", "txt", "json")}
    )
    names = archive({f"{'é' * 60}/{i}.txt": b"x" for i in range(4)}, format=2)
    draw, refused = random.Random(rounds), 0
    for number in range(rounds):
        data = damage(small if number % 2 else names, draw)
        try:
            index = scanned(data, piece=draw.choice([512, 1000, 1 << 20]))
            assert index.shard_bytes == len(data)
        except DataError:
            refused += 1
        saved = scanned(data, salvage=True)
        assert None not in read_by_index(saved, data)
        assert len(set(saved.keys)) == len(saved)
    assert refused > rounds / 3


@pytest.mark.parametrize("gap", [0, 10 << 20])
def test_joined_archives_are_an_error_and_can_be_saved(gap: int) -> None:
    first, second = (archive({f"{i}.jpg": b"x" * i, f"{i}.txt": b"t"}) for i in (1, 2))
    data = first + bytes(gap) + second
    with pytest.raises(DataError, match="two archives were joined"):
        scanned(data, piece=1 << 20)
    saved = scanned(data, piece=1 << 20, salvage=True)
    assert saved.keys == ["1", "2"] and "two archives were joined" in saved.damage


def test_memory_does_not_grow_with_the_shard() -> None:
    """Neither with its members, nor with zeros at its end, nor with headers that are never used."""
    blocks = 40_000
    folder = bytes(with_checksum(bytearray(archive({"d/": b""})[:BLOCK])))
    for filler in (bytes(BLOCK), folder):
        start = archive({"a.txt": b"x"})[: 2 * BLOCK]
        pieces = [start, *([filler * 2000] * (blocks // 2000)), bytes(2 * BLOCK)]
        total = sum(map(len, pieces))
        tracemalloc.start()
        index = scan((bytes(bytearray(piece)) for piece in pieces), total, "x.tar")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert (index.keys, index.shard_bytes) == (["a"], total)
        assert peak < 12 << 20 < total
