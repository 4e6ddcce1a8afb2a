"""Archives that Python's tarfile writes: each member is in one count, and has tarfile's content."""

from __future__ import annotations

import io
import re
import tarfile

import hypothesis.strategies as st

from data_pipeline.common.errors import DataError
from data_pipeline.preparing.second_count import count_members
from data_pipeline.shards.shard_index import ShardIndex
from data_pipeline.shards.tar import split_name
from tests.support.properties import check_property, num_examples
from tests.support.tar_archives import scan_bytes

Member = tuple[str, bytes, int]
"""Name, type and size."""

_PARTS = st.sampled_from(
    ["a", "b", "A", "0", ".", "..", ".jpg", ".JPG", ".txt", ".tar.gz", ".json", ".seg.png", " ",
     "é", "e\u0301", "日本", "İ", "\udcff", "\n", "=", "\\",
     "__", "__MACOSX", ".DS_Store", "._", "x" * 60]
)  # fmt: skip
_COMPONENTS = st.lists(
    _PARTS | st.characters(exclude_characters="\0/"), min_size=1, max_size=4
).map("".join)
_FREE_NAMES = st.lists(_COMPONENTS, min_size=1, max_size=4).map("/".join)
_USUAL_NAMES = st.builds(
    "{}{}{}".format,
    st.sampled_from(["", "", "d/", "./", "D/e.f/", "d" * 120 + "/", "日本/" * 20]),
    st.sampled_from(["0", "1", "B", "b", "é", "0.1"]),
    st.sampled_from([".jpg", ".txt", ".json", ".JPG", ".seg.png", ".jpg.jpg", ".tar.gz"]),
)
_TYPES = st.sampled_from([tarfile.REGTYPE] * 8 + [tarfile.AREGTYPE, tarfile.DIRTYPE])
_MEMBERS = st.lists(
    st.tuples(_USUAL_NAMES | _FREE_NAMES, _TYPES, st.integers(0, 1100)), max_size=10
)
_FORMATS = st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])


def write_tar(members: list[Member], format: int) -> bytes:
    """An archive of the members whose names the format can store."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for i, (name, kind, size) in enumerate(members):
            info = tarfile.TarInfo(name)
            info.type = kind
            data = (
                f"{i} {name} ".encode("utf-8", "replace") * size if kind != tarfile.DIRTYPE else b""
            )
            info.size = len(data[:size])
            try:
                tar.addfile(info, io.BytesIO(data))
            except (ValueError, UnicodeError):  # too long for USTAR, or half of a character
                continue
    return buffer.getvalue()


def num_lost(index: ShardIndex) -> int:
    match = re.search(r"with ([\d,]+) files?", index.corruption)
    return int(match[1].replace(",", "")) if match else 0


def check_contents(index: ShardIndex, data: bytes) -> None:
    """Against tarfile: keys, extensions and contents."""
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        infos = {info.offset_data: info for info in tar.getmembers() if info.isfile()}
        for i, key in enumerate(index.keys):
            for member in index.members(i):
                start = int(index.offsets[i]) + member.start
                info = infos.pop(start)
                content = tar.extractfile(info)
                assert content and content.read() == data[start : start + member.size]
                name = info.name.encode("utf-8", "surrogateescape").decode(
                    "utf-8", "backslashreplace"
                )
                assert split_name(name) == (key, member.extension)
                assert name.lower().endswith(f".{member.extension}")


@num_examples
def test_every_member_that_tarfile_writes_is_in_one_count(examples: int) -> None:
    def check(members: list[Member], format: int) -> None:
        data = write_tar(members, format)
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            num_members = len(tar.getmembers())
        salvaged = scan_bytes(data, salvage=True)
        in_samples = len(salvaged.columns["member_size"])
        assert in_samples + sum(salvaged.ignored.values()) + num_lost(salvaged) == num_members
        check_contents(salvaged, data)
        try:
            index = scan_bytes(data)
        except DataError as error:
            assert num_lost(salvaged) or "but no samples" in str(error)
            return
        assert index.to_bytes() == salvaged.to_bytes() and not num_lost(salvaged)
        again = count_members(io.BytesIO(data), index)
        assert (again.in_samples, again.problems) == (in_samples, [])
        assert again.ignored == index.ignored

    check_property(check, examples, _MEMBERS, _FORMATS)


@num_examples
def test_any_name_has_a_key_or_none(examples: int) -> None:
    """Key and extension are what WebDataset makes of a name."""

    def check(name: str) -> None:
        key, extension = split_name(name)
        if not key:
            base, first = name.rpartition("/")[2], name.partition("/")[0]
            is_reserved = first[:2] == first[-2:] == "__" and len(first) >= 4
            assert is_reserved or base.startswith(".") or not base.partition(".")[2]
            assert not extension
            return
        end = name[len(key) + 1 :]
        assert name == f"{key}.{end}" and extension == end.lower()
        assert "." not in key.rpartition("/")[2] and not key.endswith("/") and "/" not in end

    check_property(check, examples, _USUAL_NAMES | _FREE_NAMES)
