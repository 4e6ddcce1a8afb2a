"""Our tar reading against Python's tarfile, and names against webdataset's."""

from __future__ import annotations

import io
import random
import tarfile
from pathlib import Path

import pytest

from data_pipeline.common.errors import DataError
from data_pipeline.shards.tar import BLOCK, Source, TarMember, find_header, split_name, walk


def archive(files: dict[str, bytes], format: int = tarfile.USTAR_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def source(data: bytes) -> Source:
    return lambda offset, count: data[offset : offset + count]


def walked(data: bytes, start: int = 0) -> list[TarMember]:
    return list(walk(source(data), len(data), "x.tar", start=start))


def with_checksum(header: bytearray) -> bytearray:
    """A header whose checksum is right again, summed up plainly."""
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    return header


FILES = {"a/1.jpg": b"j" * 700, "a/1.txt": b"", "2.json": b"{}" * 256, "2.txt": b"hello"}


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_it_finds_what_tarfile_finds(format: int) -> None:
    long = FILES | {"long/" * 18 + "n" * 90 + ".txt": b"long"}
    if format != tarfile.USTAR_FORMAT:
        long |= {"very/" * 60 + "long.txt": b"very long", "é/ü☃.txt": b"accents"}
    data = archive(long, format)
    found = {member.name: data[member.data : member.data + member.size] for member in walked(data)}
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        assert found == {info.name: tar.extractfile(info).read() for info in tar}  # type: ignore[union-attr]
    assert found == long


def test_members_follow_each_other_without_gaps() -> None:
    data = archive({"very/" * 60 + "long.txt": b"x"} | FILES, tarfile.PAX_FORMAT)
    members = walked(data)
    assert members[0].start == 0
    assert [member.start for member in members[1:]] == [member.end for member in members[:-1]]
    assert walked(data, start=members[2].start) == members[2:]


def test_folders_are_passed_over_and_links_refused() -> None:
    for kind, names in (
        (tarfile.DIRTYPE, ["x.txt"]),
        (tarfile.SYMTYPE, None),
        (tarfile.LNKTYPE, None),
    ):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            odd = tarfile.TarInfo("odd")
            odd.type, odd.linkname = kind, "/etc/passwd"
            tar.addfile(odd)
            tar.addfile(tarfile.TarInfo("x.txt"))
        if names is None:
            with pytest.raises(DataError, match="link or device"):
                walked(buffer.getvalue())
        else:
            assert [member.name for member in walked(buffer.getvalue())] == names


def test_the_oldest_kind_of_archive() -> None:
    data = bytearray(archive({"d/": b"", "x.txt": b"hello"}))
    for start in (0, 512):  # no mark, no type; a folder is known by its slash
        header = data[start : start + BLOCK]
        header[156], header[257:] = 0, bytes(BLOCK - 257)
        data[start : start + BLOCK] = with_checksum(header)
    with tarfile.open(fileobj=io.BytesIO(bytes(data))) as tar:
        assert [info.name for info in tar if info.isfile()] == ["x.txt"]
    assert [(member.name, member.size) for member in walked(bytes(data))] == [("x.txt", 5)]


def test_bytes_that_are_no_text_can_still_be_shown() -> None:
    data = bytearray(archive({"a\0\0.txt": b"x"}))
    data[0:7] = b"a\xff\xfe.txt"
    data[:BLOCK] = with_checksum(data[:BLOCK])
    assert walked(bytes(data))[0].name == r"a\xff\xfe.txt"


def test_a_checksum_is_the_sum_of_the_bytes() -> None:
    draw = random.Random(1)
    for fill in (0, 0xFF, None):
        header = bytearray(draw.randbytes(BLOCK) if fill is None else bytes([fill]) * BLOCK)
        header[:6], header[124:136] = b"x.txt\0", b"00000000000\0"
        header[156:157] = b"0"
        good = bytes(with_checksum(header)) + bytes(BLOCK)
        assert len(walked(good)) == 1
        for wrong in (-1, 1, 65521, -65521):  # a sum that is only right modulo 65521 is not right
            number = sum(header) - sum(header[148:156]) + 256 + wrong
            bad = bytearray(good)
            bad[148:156] = f"{max(number, 0):07o}\0".encode()
            with pytest.raises(DataError, match="damaged"):
                walked(bytes(bad))


def test_every_cut_is_noticed() -> None:
    data = archive(FILES)
    end = walked(data)[-1].end
    for cut in range(0, end + 1, 64):
        with pytest.raises(DataError, match="cut off") as error:
            walked(data[:cut])
        assert error.value.slug == "truncated"
    assert len(walked(data[: end + 512])) == len(FILES)  # one zero block is an end mark


def test_a_flipped_bit_in_any_header_byte_is_noticed() -> None:
    data = archive(FILES)
    start = walked(data)[1].start
    for place in range(start, start + 512):
        damaged = bytearray(data)
        damaged[place] ^= 0x04
        if damaged[start + 148 : start + 156].strip(b" \0") == data[
            start + 148 : start + 156
        ].strip(b" \0"):
            with pytest.raises(DataError):
                walked(bytes(damaged))


def test_zeros_in_the_middle_do_not_end_it_silently() -> None:
    data = bytearray(archive(FILES))
    start = walked(bytes(data))[1].start
    data[start : start + 1024] = bytes(1024)
    with pytest.raises(DataError, match="end mark at byte 1536, but there is data after it"):
        walked(bytes(data))


def test_rubbish_is_no_tar() -> None:
    with pytest.raises(DataError, match="no tar header"):
        walked(b"<html>not found</html>".ljust(2048, b"x"))
    with pytest.raises(DataError, match="no tar header"):  # Python would read this as a number
        walked(archive(FILES)[:148] + b"+1_0_0\0 " + archive(FILES)[156:])


@pytest.mark.parametrize(
    ("records", "message"),
    [
        (b"11 path=x\n", "is damaged"),
        (b"8 path=x\n", "is damaged"),
        (b"7 path=\n", "is damaged"),
        (b"x path=x\n", "is damaged"),
        (b"999999999 path=x\n", "is damaged"),
        (b"13 size=1e10\n", "damaged size"),
        (b"-5 a=b\n", "is damaged"),
        (b" 6 a=b\n", "is damaged"),
        (b"0 a=b\n", "is damaged"),
        (b"1 a=b\n", "is damaged"),
        (b"2 a=b\n", "is damaged"),
    ],
)
def test_damaged_extended_headers(records: bytes, message: str) -> None:
    data = bytearray(archive({"x.txt": b"1"} | {"é" * 40 + ".txt": b"2"}, tarfile.PAX_FORMAT))
    start = walked(bytes(data))[1].start + BLOCK
    size = int(data[start - BLOCK + 124 : start - BLOCK + 135], 8)
    data[start : start + size] = records.ljust(size, b"\0")
    with pytest.raises(DataError, match=message) as error:
        walked(bytes(data))
    assert error.value.slug == "bad-tar"


@pytest.mark.timeout(20)
def test_many_small_records_take_no_time() -> None:
    header = bytearray(archive({"x": bytes(900_000)}, tarfile.USTAR_FORMAT)[:BLOCK])
    header[156:157] = b"x"
    records = b"6 a=b\n" * 150_000
    data = (
        bytes(with_checksum(header))
        + records.ljust(-(-900_000 // BLOCK) * BLOCK, b"\0")
        + archive(FILES)
    )
    assert [member.name for member in walked(data)] == list(FILES)


def test_the_next_header_is_found_again() -> None:
    data = archive({"1.jpg": b"ustar" * 2000, "2.jpg": b"x" * 3000, "3.txt": b"y"})
    starts = [member.start for member in walked(data)]
    assert find_header(source(data), 0, len(data)) == 0
    assert find_header(source(data), 512, len(data)) == starts[1]
    damaged = data[: starts[1] + 5] + b"!" + data[starts[1] + 6 :]
    assert find_header(source(damaged), 512, len(data)) == starts[2]
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
def test_names_split_as_webdataset_splits_them(
    name: str, expected: tuple[str, str], tmp_path: Path
) -> None:
    assert split_name(name) == expected
    import webdataset

    (tmp_path / "x.tar").write_bytes(archive({name: b"1"}))
    found = list(
        webdataset.WebDataset(str(tmp_path / "x.tar"), shardshuffle=False, empty_check=False)
    )
    if expected[0]:
        assert found[0]["__key__"] == expected[0]
        assert found[0][expected[1]] == b"1"
    elif name not in (
        "x.",
        "x/.y.txt",
    ):  # these are files with an empty extension or key to webdataset
        assert found == []
