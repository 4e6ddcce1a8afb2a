"""Unusual members of archives: each is in a sample, ignored by a rule, or refused by its name."""

from __future__ import annotations

import io
import re
import tarfile
from collections import Counter

import hypothesis.strategies as st
import pytest

from data_pipeline.common.errors import DataError
from data_pipeline.shards.scan import scan
from data_pipeline.shards.shard_index import ShardIndex
from data_pipeline.shards.tar import BLOCK
from tests.support.properties import check_property, num_examples
from tests.support.tar_archives import archive, read_by_index, scan_bytes, set_checksum

FILES = {"1.jpg": b"j" * 700, "1.txt": b"one", "2.jpg": b"k" * 900, "2.txt": b"two"}
SPARSE_FORMATS = {
    "0.0": {"GNU.sparse.size": "900", "GNU.sparse.offset": "0", "GNU.sparse.numbytes": "9"},
    "0.1": {"GNU.sparse.name": "2.jpg", "GNU.sparse.size": "900", "GNU.sparse.map": "0,9"},
    "1.0": {
        "GNU.sparse.major": "1",
        "GNU.sparse.minor": "0",
        "GNU.sparse.name": "2.jpg",
        "GNU.sparse.realsize": "900",
    },
}


def member(name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = "") -> bytes:
    """The blocks of a member."""
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = len(data), kind, link
    return info.tobuf(tarfile.GNU_FORMAT) + data.ljust(-(-len(data) // BLOCK) * BLOCK, b"\0")


def pax_member(name: str, data: bytes, records: dict[str, str]) -> bytes:
    """The blocks of a member with pax records."""
    info = tarfile.TarInfo(name)
    info.size, info.pax_headers = len(data), records
    return info.tobuf(tarfile.PAX_FORMAT) + data.ljust(-(-len(data) // BLOCK) * BLOCK, b"\0")


def old_gnu_sparse(name: str, blocks: int = 3) -> bytes:
    """A sparse file whose map continues in two blocks after its header."""
    headers = bytearray(member(name, bytes(blocks * BLOCK), b"S")[: -blocks * BLOCK])
    headers[-BLOCK + 482] = 1
    headers[-BLOCK:] = set_checksum(headers[-BLOCK:])
    maps = bytes(504) + b"\1" + bytes(7) + bytes(BLOCK)
    return bytes(headers) + maps + b"s" * blocks * BLOCK


def shard_of(*members: bytes) -> bytes:
    return b"".join(members) + bytes(2 * BLOCK)


def scan_all(data: bytes, *, salvage: bool = False) -> ShardIndex:
    return scan(iter([data]), len(data), "x.tar", salvage=salvage)


PLAIN = [member(name, data) for name, data in FILES.items()]


def check_refused(odd: bytes, message: str) -> None:
    """Member 2.jpg is refused; salvage keeps the other sample and counts the loss."""
    data = shard_of(*PLAIN[:2], odd, PLAIN[3], member("3.jpg", b"x"), member("3.txt", b"y"))
    with pytest.raises(DataError, match=message) as error:
        scan_bytes(data)
    assert error.value.slug == "unsupported-tar" and "'2.jpg'" in str(error.value)
    salvaged = scan_bytes(data, salvage=True)
    assert salvaged.keys == ["1", "3"] and None not in read_by_index(salvaged, data)
    assert "skipped 1 sample with 2 files" in salvaged.corruption
    assert salvaged.corruption.endswith("'2'")


@pytest.mark.parametrize("version", SPARSE_FORMATS)
def test_sparse_files_in_pax_archives_are_refused(version: str) -> None:
    name = "2.jpg" if version == "0.0" else "GNUSparseFile.17/2.jpg"
    odd = pax_member(name, b"1\n0\n9\n" + b"x" * 900, SPARSE_FORMATS[version])
    check_refused(odd, r"is a sparse file; .*without -S .*--no-read-sparse")


def test_old_gnu_sparse_files_are_refused() -> None:
    check_refused(old_gnu_sparse("2.jpg"), "is a sparse file; .*without -S")


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        (tarfile.LNKTYPE, "hard link to '1.jpg'; .*--hard-dereference"),
        (tarfile.SYMTYPE, "symbolic link to '1.jpg'; .*--dereference"),
        (tarfile.FIFOTYPE, "named pipe; .*regular files"),
        (tarfile.CHRTYPE, "character device; "),
        (tarfile.BLKTYPE, "block device; "),
        (b"M", "part of a file in several archives"),
        (b"?", "member of the unknown type"),
    ],
)
def test_links_and_devices_are_refused(kind: bytes, what: str) -> None:
    check_refused(member("2.jpg", b"", kind, "1.jpg"), f"the member '2.jpg' at byte .* is a {what}")


def test_long_targets_of_links_are_read() -> None:
    target = "far/" * 40 + "1.jpg"
    check_refused(member("2.jpg", b"", tarfile.SYMTYPE, target), f"to '{target}'")


def test_pax_records_for_all_members_cannot_change_how_they_are_read() -> None:
    comment = tarfile.TarInfo.create_pax_global_header({"comment": "of git archive"})
    assert scan_bytes(shard_of(comment, *PLAIN)).keys == ["1", "2"]
    changed = tarfile.TarInfo.create_pax_global_header({"size": "3"})
    with pytest.raises(DataError, match="sets 'size' for all members"):
        scan_bytes(shard_of(changed, *PLAIN))


@pytest.mark.parametrize(
    ("beginning", "message"),
    [
        (b"\x1f\x8b\x08", r"is a \.gz archive.*should end in \.gz.*`gunzip`"),
        (b"BZh9", r"\.bz2 archive.*`bunzip2`"),
        (b"\xfd7zXZ\0", r"\.xz archive.*`unxz`"),
        (b"\x28\xb5\x2f\xfd", r"\.zst archive.*`unzstd`"),
        (b"PK\3\4", r"\.zip archive.*extract it"),
    ],
)
def test_compressed_archives_are_refused(beginning: bytes, message: str) -> None:
    data = beginning + b"ustar" * 500
    with pytest.raises(DataError, match=message) as error:
        scan_bytes(data)
    assert error.value.slug == "unsupported-tar"
    salvaged = scan_bytes(data, salvage=True)
    assert not len(salvaged) and "archive, not a plain .tar" in salvaged.corruption


def test_names_may_begin_like_compressed_files() -> None:
    assert scan_bytes(archive({"BZh9.jpg": b"x", "BZh9.txt": b"y"})).keys == ["BZh9"]


def test_files_of_no_sample_are_counted_by_rule() -> None:
    names = [
        "d/",
        "d/.DS_Store",
        "d/._1.jpg",
        "__MACOSX/._1.jpg",
        "README",
        "x.",
        "__index__/a.txt",
    ]
    odd = [member(name, b"", b"5" if name.endswith("/") else b"0") for name in names]
    scanned = scan_all(shard_of(member("label", b"", b"V"), *odd, *PLAIN))
    assert scanned.ignored == {
        "volume label": 1,
        "folder": 1,
        "hidden file": 3,
        "no extension": 2,
        "reserved name": 1,
    }
    assert scanned.keys == ["1", "2"]


def test_files_that_are_not_next_to_each_other_are_counted_as_one_sample() -> None:
    apart = archive({"1.jpg": b"a", "2.jpg": b"b", "1.txt": b"c", "2.txt": b"d"})
    salvaged = scan_bytes(apart, salvage=True)
    assert salvaged.corruption == "skipped 2 samples with 4 files (key occurs twice 2): '1', '2'"
    twice = shard_of(*PLAIN, *PLAIN[:2])
    salvaged = scan_bytes(twice, salvage=True)
    assert salvaged.corruption == "skipped 2 samples with 4 files (key occurs twice 1): '1'"


def test_salvage_says_which_bytes_are_lost() -> None:
    data = bytearray(shard_of(*PLAIN))
    start = len(PLAIN[0]) + len(PLAIN[1])
    data[start] ^= 1
    salvaged = scan_bytes(bytes(data), salvage=True)
    end = start + len(PLAIN[2])
    assert f"(bytes {start:,} to {end:,} are lost)" in salvaged.corruption
    assert "skipped 1 sample with 1 file (incomplete next to corruption 1)" in salvaged.corruption


_NAMES = st.builds(
    "{}{}".format,
    st.sampled_from(["", "a/", "./", ".git/", "__MACOSX/", "__x__/", "d" * 120 + "/"]),
    st.builds(
        "{}{}".format,
        st.sampled_from(["0", "1", "B", "b", ".DS_Store", "._0", "README", "__k__", ".", "é"]),
        st.sampled_from(["", ".", ".jpg", ".JPG", ".txt", ".seg.png", ".json"]),
    ),
)
_KINDS = st.sampled_from([b"0"] * 12 + [b"1", b"2", b"5", b"6", b"7", b"S", b"pax sparse", b"V"])
_MEMBERS = st.lists(st.tuples(_NAMES, _KINDS, st.integers(0, 1200)), max_size=12)


def _odd_archive(members: list[tuple[str, bytes, int]]) -> bytes:
    blocks = []
    for name, kind, size in members:
        if kind == b"pax sparse":
            records = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": name}
            blocks.append(
                pax_member("GNUSparseFile.1/x", b"1\n0\n0\n".ljust(BLOCK, b"\0"), records)
            )
        elif kind == b"S":
            blocks.append(old_gnu_sparse(name))
        else:
            data = b"x" * size if kind in b"07" else b""
            blocks.append(member(name, data, kind, "target" if kind in b"12" else ""))
    return shard_of(*blocks)


@num_examples
def test_every_member_is_accounted_for(examples: int) -> None:
    """Against a count by Python's tarfile, which reads all of these formats."""

    def check(members: list[tuple[str, bytes, int]]) -> None:
        data = _odd_archive(members)
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            infos = tar.getmembers()
            contents = Counter(
                file.read() for info in infos if info.isfile() and (file := tar.extractfile(info))
            )
        salvaged = scan_all(data, salvage=True)
        in_samples = len(salvaged.columns["member_size"])
        match = re.search(r"with (\d+) files?", salvaged.corruption)
        lost = int(match[1]) if match else 0
        assert in_samples + sum(salvaged.ignored.values()) + lost == len(infos) == len(members)
        assert bool(lost) == bool(salvaged.corruption)

        samples = read_by_index(salvaged, data)
        used = Counter(body for sample in samples if sample for body in sample.values())
        assert None not in samples and not used - contents
        try:
            scanned = scan_all(data)
        except DataError as error:
            assert salvaged.corruption or "but no samples" in str(error)
        else:
            assert not salvaged.corruption and scanned.ignored == salvaged.ignored
            assert scanned.to_bytes() == salvaged.to_bytes()

    check_property(check, examples, _MEMBERS)
