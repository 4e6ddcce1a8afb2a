"""Our tar reading against Python's tarfile, and every kind of damage."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from data_pipeline.common.errors import DataError
from data_pipeline.shards.tar import TarMember, members_of, split_name, walk


def archive(files: dict[str, bytes], format: int = tarfile.USTAR_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def walked(data: bytes) -> list[TarMember]:
    return list(walk(lambda offset, count: data[offset : offset + count], len(data), "x.tar"))


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
    part = data[members[1].start : members[2].end]
    assert [member.name for member in members_of(part, "x")] == [members[1].name, members[2].name]


def test_folders_are_passed_over_and_links_refused() -> None:
    for kind, names in ((tarfile.DIRTYPE, ["x.txt"]), (tarfile.SYMTYPE, None)):
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
    for place in range(start, start + 512, 3):
        damaged = bytearray(data)
        damaged[place] ^= 0x04
        if damaged[start + 148 : start + 156].strip(b" \0") == data[start + 148 : start + 156].strip(b" \0"):
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


@pytest.mark.parametrize(
    ("name", "expected"),
    [("a/b.jpg", ("a/b", "jpg")), ("a.b/c.seg.PNG", ("a.b/c", "seg.png")), ("README", ("", "")),
     (".hidden", ("", "")), ("x/.y.txt", ("", "")), ("x.", ("", ""))],
)  # fmt: skip
def test_names_split_as_webdataset_splits_them(name: str, expected: tuple[str, str]) -> None:
    assert split_name(name) == expected
    from webdataset.tariterators import base_plus_ext

    key, extension = base_plus_ext(name)
    if expected[0]:
        assert (key, extension.lower()) == expected


def test_a_file_of_webdatasets_writer(tmp_path: Path) -> None:
    from webdataset import TarWriter

    with TarWriter(str(tmp_path / "x.tar"), mtime=0) as tar:
        tar.write({"__key__": "k", "txt": "hello", "json": {"a": 1}})
    data = (tmp_path / "x.tar").read_bytes()
    assert [(member.name, member.size) for member in walked(data)] == [("k.json", 8), ("k.txt", 5)]
