"""A second count of the files of shards and of a dataset's folder, independent of the index.

Python's tarfile lists the members of a shard, and the file system those of the folder: what neither
the index nor the manifest has would never be trained on, and no checksum would show it.
"""

from __future__ import annotations

import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, BinaryIO, NamedTuple, cast

from data_pipeline.common import storage
from data_pipeline.common.errors import StorageError
from data_pipeline.common.tables import counted, join_counts
from data_pipeline.shards.manifest import MANIFEST_NAME, SKIPPED_NAME, Manifest
from data_pipeline.shards.patterns import is_shard_name
from data_pipeline.shards.shard_index import ShardIndex

_MAX_NAMED = 3


@dataclass
class FileCount:
    """The members of a shard by what becomes of them."""

    in_samples: int = 0
    ignored: Counter[str] = field(default_factory=Counter)
    """Number of members that belong to no sample, by rule."""
    problems: list[tuple[str, str]] = field(default_factory=list)
    """Reason and detail of every difference from the index."""


def count_members(file: BinaryIO, index: ShardIndex) -> FileCount:
    """Count the members of a shard with tarfile, and compare them with its index.

    Args:
        file: The shard; it can seek.
        index: Its index.
    """
    expected = dict(_indexed_files(index))
    count, unknown = FileCount(), list[str]()
    try:
        for member in _members(file):
            found = expected.pop(member.offset_data, None) if member.isreg() else None
            if found and found[0] == member.size and member.name.lower().endswith(found[1]):
                count.in_samples += 1
            elif rule := _ignoring_rule(member):
                count.ignored[rule] += 1
            else:
                unknown.append(member.name)
    except (tarfile.TarError, ValueError, OverflowError) as error:
        count.problems.append(("not-readable", f"Python's tarfile cannot read it: {error}"))
        return count
    if unknown:
        count.problems.append(("not-in-index", _first_names(unknown, "its index lacks")))
    if expected:
        names = [f"*{extension} at byte {start}" for start, (_, extension) in expected.items()]
        count.problems.append(("not-in-shard", _first_names(names, "its index has, but it lacks")))
    return count


class FolderCount(NamedTuple):
    """Files of a dataset's folder that its manifest does not list."""

    folder: str
    shards: tuple[str, ...] = ()
    """Files beside the manifest whose names are those of shards."""
    shards_below: tuple[str, ...] = ()
    """The same in folders below it."""
    others: Mapping[str, int] = MappingProxyType({})
    """Number of other files by extension."""
    problem: str = ""
    """Why the folder could not be listed."""

    def lines(self) -> Iterator[str]:
        """What a user has to know; nothing if the manifest lists all files."""
        folder = storage.redact(self.folder)
        if self.problem:
            yield f"{folder} cannot be listed, so its files were not counted: {self.problem}"
        if self.shards_below:
            shards = counted(len(self.shards_below), "shard")
            names = _first_names(self.shards_below, f"below {folder}, there are {shards}")
            yield f"{names}; `vlmoe data index '{folder}/**'` includes them"
        if self.others:
            others = counted(sum(self.others.values()), "other file")
            yield f"{folder} has {others} ({join_counts(self.others)})"


def count_folder(manifest: Manifest) -> FolderCount:
    """Compare the files of a folder with its manifest; with none if its shards are elsewhere.

    Hidden files and folders are not counted: `vlmoe` stores results of its commands in them. Nor
    are folders with a manifest of their own.
    """
    if manifest.base != manifest.url:
        return FolderCount(manifest.base)
    try:
        paths = storage.list_tree(manifest.base)
    except StorageError as error:
        return FolderCount(manifest.base, problem=str(error))
    known = {MANIFEST_NAME, SKIPPED_NAME}
    for entry in manifest.shards:
        known |= {entry.name, entry.index, f"{entry.name}.index"}
    datasets = tuple(
        path.removesuffix(MANIFEST_NAME) for path in paths if path.endswith(f"/{MANIFEST_NAME}")
    )
    rest = [
        path
        for path in paths
        if path not in known and "/." not in f"/{path}" and not path.startswith(datasets)
    ]
    shards = [path for path in rest if is_shard_name(path)]
    return FolderCount(
        manifest.base,
        tuple(path for path in shards if "/" not in path),
        tuple(path for path in shards if "/" in path),
        Counter(_extension(path) for path in rest if not is_shard_name(path)),
    )


def _members(file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    with tarfile.open(
        fileobj=file, mode="r:", encoding="utf-8", errors="backslashreplace"
    ) as archive:
        while (member := archive.next()) is not None:
            cast(Any, archive).members = []  # it would keep all of them
            yield member


def _indexed_files(index: ShardIndex) -> Iterator[tuple[int, tuple[int, str]]]:
    """Where the content of every file of the index begins, its size, and the end of its name."""
    for sample in range(len(index)):
        for member in index.members(sample):
            start = int(index.offsets[sample]) + member.start
            yield start, (member.size, f".{member.extension}".lower())


def _ignoring_rule(member: tarfile.TarInfo) -> str:
    """By which rule a member belongs to no sample; empty if it should belong to one."""
    if member.isdir() or member.type == b"D":  # GNU's folder with a list of its files
        return "folder"
    if member.type == b"V":
        return "volume label"
    base, first = member.name.rpartition("/")[2], member.name.partition("/")[0]
    if base.startswith("."):
        return "hidden file"
    if not base.partition(".")[2]:
        return "no extension"
    is_reserved = first.startswith("__") and first.endswith("__") and len(first) >= 4
    return "reserved name" if is_reserved else ""


def _extension(path: str) -> str:
    base = path.rpartition("/")[2]
    return f".{base.rpartition('.')[2]}" if "." in base else "no extension"


def _first_names(names: Sequence[str], what: str) -> str:
    first: Iterable[str] = map(repr, names[:_MAX_NAMED])
    others = len(names) - _MAX_NAMED
    return f"{what} {', '.join(first)}" + (f" and {others:,} more" if others > 0 else "")
