"""The tar reader against Python's tarfile, and split names against webdataset."""

from __future__ import annotations

import io
import random
import tarfile
from pathlib import Path

import pytest

from data_pipeline.common.errors import DataError
from data_pipeline.shards.tar import (
    BLOCK,
    FILE,
    FOLDER,
    Source,
    TarMember,
    find_header,
    split_name,
    walk,
)
from tests.support.tar_archives import archive, set_checksum


def source(data: bytes) -> Source:
    return lambda offset, count: data[offset : offset + count]


def read_members(data: bytes, start: int = 0) -> list[TarMember]:
    return list(walk(source(data), len(data), "x.tar", start=start))


FILES = {"a/1.jpg": b"j" * 700, "a/1.txt": b"", "2.json": b"{}" * 256, "2.txt": b"hello"}


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_match_tarfile(format: int) -> None:
    files = FILES | {"long/" * 18 + "n" * 90 + ".txt": b"long"}
    if format != tarfile.USTAR_FORMAT:
        files |= {"very/" * 60 + "long.txt": b"very long", "é/ü☃.txt": b"accents"}
    data = archive(files, format)
    contents = {
        member.name: data[member.data : member.data + member.size] for member in read_members(data)
    }
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        members = ((info.name, tar.extractfile(info)) for info in tar)
        assert contents == {name: file.read() for name, file in members if file is not None}
    assert contents == files


def test_members_are_contiguous() -> None:
    data = archive({"very/" * 60 + "long.txt": b"x"} | FILES, tarfile.PAX_FORMAT)
    members = read_members(data)
    assert members[0].start == 0
    assert [member.start for member in members[1:]] == [member.end for member in members[:-1]]
    assert read_members(data, start=members[2].start) == members[2:]


def test_v7_archive() -> None:
    data = bytearray(archive({"d/": b"", "x.txt": b"hello"}))
    for start in (0, 512):  # no magic, no type; a folder is recognized by its slash
        header = data[start : start + BLOCK]
        header[156], header[257:] = 0, bytes(BLOCK - 257)
        data[start : start + BLOCK] = set_checksum(header)
    with tarfile.open(fileobj=io.BytesIO(bytes(data))) as tar:
        assert [info.name for info in tar if info.isfile()] == ["x.txt"]
    kinds = [(member.name, member.size, member.kind) for member in read_members(bytes(data))]
    assert kinds == [("d/", 0, FOLDER), ("x.txt", 5, FILE)]


def test_names_that_are_not_utf8_are_escaped() -> None:
    data = bytearray(archive({"a\0\0.txt": b"x"}))
    data[0:7] = b"a\xff\xfe.txt"
    data[:BLOCK] = set_checksum(data[:BLOCK])
    assert read_members(bytes(data))[0].name == r"a\xff\xfe.txt"


def test_checksum_is_the_sum_of_bytes() -> None:
    random_bytes = random.Random(1).randbytes
    for fill in (0, 0xFF, None):
        header = bytearray(random_bytes(BLOCK) if fill is None else bytes([fill]) * BLOCK)
        header[:6], header[124:136] = b"x.txt\0", b"00000000000\0"
        header[156:157] = b"0"
        valid = bytes(set_checksum(header)) + bytes(BLOCK)
        assert len(read_members(valid)) == 1
        for error in (-1, 1, 65521, -65521):  # a sum that is right modulo 65521 is still wrong
            checksum = sum(header) - sum(header[148:156]) + 256 + error
            corrupt = bytearray(valid)
            corrupt[148:156] = f"{max(checksum, 0):07o}\0".encode()
            with pytest.raises(DataError, match="byte 0 is corrupt"):
                read_members(bytes(corrupt))


def test_truncation_at_any_offset_is_detected() -> None:
    data = archive(FILES)
    end = read_members(data)[-1].end
    for cut in range(0, end + 1, 64):
        with pytest.raises(DataError, match=r"^x\.tar.*truncated") as error:
            read_members(data[:cut])
        assert error.value.slug == "truncated"
    assert len(read_members(data[: end + 512])) == len(FILES)  # one zero block is an end marker


def test_bit_flip_in_any_header_byte_is_detected() -> None:
    data = archive(FILES)
    start = read_members(data)[1].start
    checksum = slice(start + 148, start + 156)
    for offset in range(start, start + 512):
        corrupt = bytearray(data)
        corrupt[offset] ^= 0x04
        if corrupt[checksum].strip(b" \0") == data[checksum].strip(b" \0"):
            with pytest.raises(DataError):
                read_members(bytes(corrupt))


def test_zeros_in_the_middle_are_an_error() -> None:
    data = bytearray(archive(FILES))
    start = read_members(bytes(data))[1].start
    data[start : start + 1024] = bytes(1024)
    with pytest.raises(DataError, match="data after the end-of-archive marker at byte 1536"):
        read_members(bytes(data))


def test_other_data_is_rejected() -> None:
    with pytest.raises(DataError, match="no valid tar header at byte 0"):
        read_members(b"<html>not found</html>".ljust(2048, b"x"))
    with pytest.raises(DataError, match="no valid tar header at byte 0"):  # int() would accept this
        read_members(archive(FILES)[:148] + b"+1_0_0\0 " + archive(FILES)[156:])


@pytest.mark.parametrize(
    ("records", "message"),
    [
        (b"11 path=x\n", "is corrupt"),
        (b"8 path=x\n", "is corrupt"),
        (b"7 path=\n", "is corrupt"),
        (b"x path=x\n", "is corrupt"),
        (b"999999999 path=x\n", "is corrupt"),
        (b"13 size=1e10\n", "invalid size"),
        (b"-5 a=b\n", "is corrupt"),
        (b" 6 a=b\n", "is corrupt"),
        (b"0 a=b\n", "is corrupt"),
        (b"1 a=b\n", "is corrupt"),
        (b"2 a=b\n", "is corrupt"),
    ],
)
def test_corrupt_extended_headers(records: bytes, message: str) -> None:
    data = bytearray(archive({"x.txt": b"1"} | {"é" * 40 + ".txt": b"2"}, tarfile.PAX_FORMAT))
    start = read_members(bytes(data))[1].start + BLOCK
    size = int(data[start - BLOCK + 124 : start - BLOCK + 135], 8)
    data[start : start + size] = records.ljust(size, b"\0")
    with pytest.raises(DataError, match=message) as error:
        read_members(bytes(data))
    assert error.value.slug == "corrupt-tar"


@pytest.mark.timeout(20)
def test_many_small_records_are_fast() -> None:
    header = bytearray(archive({"x": bytes(900_000)}, tarfile.USTAR_FORMAT)[:BLOCK])
    header[156:157] = b"x"
    records = b"6 a=b\n" * 150_000
    data = (
        bytes(set_checksum(header))
        + records.ljust(-(-900_000 // BLOCK) * BLOCK, b"\0")
        + archive(FILES)
    )
    assert [member.name for member in read_members(data)] == list(FILES)


def test_find_header() -> None:
    data = archive({"1.jpg": b"ustar" * 2000, "2.jpg": b"x" * 3000, "3.txt": b"y"})
    starts = [member.start for member in read_members(data)]
    assert find_header(source(data), 0, len(data)) == 0
    assert find_header(source(data), 512, len(data)) == starts[1]
    corrupt = data[: starts[1] + 5] + b"!" + data[starts[1] + 6 :]
    assert find_header(source(corrupt), 512, len(data)) == starts[2]
    assert find_header(source(data), starts[2] + 512, len(data)) == len(data)


NAMES = [
    ("a/b.jpg", ("a/b", "jpg")),
    ("a.b/c.seg.PNG", ("a.b/c", "seg.png")),
    ("README", ("", "")),
    (".hidden", ("", "")),
    ("x/.y.txt", ("", "")),
    ("x.", ("", "")),
    ("./a.txt", ("./a", "txt")),
    ("__index__/0.txt", ("", "")),
    ("__meta__.json", ("__meta__", "json")),
    ("__x__", ("", "")),
    ("____/a.txt", ("", "")),
    ("___/a.txt", ("___/a", "txt")),
    ("a/__b__/c.txt", ("a/__b__/c", "txt")),
]


@pytest.mark.parametrize(("name", "expected"), NAMES)
def test_split_name_matches_webdataset(
    name: str, expected: tuple[str, str], tmp_path: Path
) -> None:
    assert split_name(name) == expected
    import webdataset

    (tmp_path / "x.tar").write_bytes(archive({name: b"1"}))
    samples = list(
        webdataset.WebDataset(str(tmp_path / "x.tar"), shardshuffle=False, empty_check=False)
    )
    if expected[0]:
        assert samples[0]["__key__"] == expected[0]
        assert samples[0][expected[1]] == b"1"
    elif name not in ("x.", "x/.y.txt"):  # webdataset accepts an empty extension or key
        assert samples == []
