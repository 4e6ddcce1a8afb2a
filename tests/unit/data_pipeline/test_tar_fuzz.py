"""Fuzzed, joined and very large archives: no crash, and bounded memory."""

from __future__ import annotations

import random
import tracemalloc

import pytest

from data_pipeline.common.errors import DataError
from data_pipeline.shards.scan import scan
from data_pipeline.shards.tar import BLOCK
from tests.support.tar_archives import archive, read_by_index, scan_bytes, set_checksum


def corrupt_randomly(data_bytes: bytes, rng: random.Random) -> bytes:
    data = bytearray(data_bytes)
    for _ in range(rng.randrange(1, 4)):
        start = rng.randrange(len(data))
        match rng.randrange(6):
            case 0:
                data[start] ^= 1 << rng.randrange(8)
            case 1:
                data[start : start + rng.randrange(2000)] = rng.randbytes(rng.randrange(2000))
            case 2:
                del data[start + 1 :]
            case 3:
                block = start // BLOCK * BLOCK
                data[block : block + BLOCK] = set_checksum(
                    bytearray(
                        rng.randbytes(124) + b"%011o\0" % rng.randrange(8**11) + rng.randbytes(376)
                    )
                )
            case 4:
                block = start // BLOCK * BLOCK  # a valid header with an unusual type or size
                header = data[block : block + BLOCK]
                header[124:136] = rng.choice(
                    [b"%011o\0" % rng.randrange(5000), b"\x80" + rng.randbytes(11)]
                )
                header[156:157] = rng.choice([b"L", b"x", b"g", b"5", b"2", b"0", b"S"])
                if len(header) == BLOCK:
                    data[block : block + BLOCK] = set_checksum(header)
            case 5:
                data[start:start] = bytes(rng.randrange(4) * BLOCK)
    return bytes(data)


@pytest.mark.parametrize("rounds", [1500, pytest.param(30_000, marks=pytest.mark.long)])
def test_fuzzed_archives(rounds: int) -> None:
    small = archive(
        {f"{i}.{name}": bytes([i]) * 300 for i in range(6) for name in ("jpg", "txt", "json")}
    )
    names = archive({f"{'é' * 60}/{i}.txt": b"x" for i in range(4)}, format=2)
    rng, rejected = random.Random(rounds), 0
    for number in range(rounds):
        data = corrupt_randomly(small if number % 2 else names, rng)
        try:
            index = scan_bytes(data, chunk=rng.choice([512, 1000, 1 << 20]))
            assert index.shard_bytes == len(data)
        except DataError:
            rejected += 1
        salvaged = scan_bytes(data, salvage=True)
        assert None not in read_by_index(salvaged, data)
        assert len(set(salvaged.keys)) == len(salvaged)
    assert rejected > rounds / 3


@pytest.mark.parametrize("gap", [0, 10 << 20])
def test_joined_archives(gap: int) -> None:
    first, second = (archive({f"{i}.jpg": b"x" * i, f"{i}.txt": b"t"}) for i in (1, 2))
    data = first + bytes(gap) + second
    with pytest.raises(DataError, match="two archives were joined"):
        scan_bytes(data, chunk=1 << 20)
    salvaged = scan_bytes(data, chunk=1 << 20, salvage=True)
    assert salvaged.keys == ["1", "2"] and "two archives were joined" in salvaged.corruption


def test_memory_is_bounded() -> None:
    """Independent of the number of zeros at the end and of headers without a sample."""
    blocks = 40_000
    folder = bytes(set_checksum(bytearray(archive({"d/": b""})[:BLOCK])))
    for filler in (bytes(BLOCK), folder):
        start = archive({"a.txt": b"x"})[: 2 * BLOCK]
        chunks = [start, *([filler * 2000] * (blocks // 2000)), bytes(2 * BLOCK)]
        total = sum(map(len, chunks))
        tracemalloc.start()
        index = scan((bytes(bytearray(chunk)) for chunk in chunks), total, "x.tar")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert (index.keys, index.shard_bytes) == (["a"], total)
        assert peak < 12 << 20 < total
