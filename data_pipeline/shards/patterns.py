"""Which shards are meant: folders, braces, wildcards and list files, as addresses.

data/train                         the .tar files of a folder (not of its folders: use data/**)
s3://bucket/pairs-{000..127}.tar   braces: exactly these, also where nothing can be listed
's3://bucket/*/part-??.tar'        wildcards, local or in a store that can be listed; ** crosses folders
@shards.txt                        a file with one of all these a line; # begins a comment
"""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator, Sequence

from data_pipeline.common import storage
from data_pipeline.common.addresses import WHERE_KEYS_GO, has_user
from data_pipeline.common.errors import DataError

_MAX_LISTS = 8
"""Lists that name lists."""


def expand(patterns: Sequence[str]) -> list[str]:
    """Addresses of the shards that patterns stand for, each once, in order.

    Raises:
        DataError: One of them stands for nothing.
        StorageError: A folder or list cannot be read.
    """
    found: dict[str, None] = {}
    for pattern in patterns:
        found.update(dict.fromkeys(_expand(pattern, 0)))
    return list(found)


def _expand(pattern: str, depth: int) -> list[str]:
    if pattern.startswith("@"):
        return _listed(pattern[1:], depth)
    shards = [shard for url in _braces(pattern) for shard in _shards_at(url)]
    if not shards:
        raise DataError(
            f"no shards at {storage.redact(pattern)}; give a folder that holds .tar files (FOLDER/** for those "
            f"of the folders in it too), or their paths"
        )
    return shards


def _braces(pattern: str) -> list[str]:
    from braceexpand import braceexpand

    try:
        return list(braceexpand(pattern))
    except ValueError as error:
        raise DataError(
            f"{storage.redact(pattern)}: its braces do not close; write {{000..127}}"
        ) from error


def _listed(url: str, depth: int) -> list[str]:
    """The shards of a list file; names without a folder in a list of a store lie beside it."""
    if depth >= _MAX_LISTS:
        raise DataError(
            f"@{storage.redact(url)}: lists name lists more than {_MAX_LISTS} deep; do they name each other?"
        )
    try:
        text = storage.read_bytes(url).decode()
    except UnicodeDecodeError as error:
        raise DataError(
            f"@{storage.redact(url)} is no list: it is not text; one address a line"
        ) from error
    lines = [line.partition(" #")[0].strip() for line in text.splitlines()]
    lines = [line for line in lines if line and not line.startswith("#")]
    if not lines:
        raise DataError(f"@{storage.redact(url)} lists no shards; write one address a line")
    if not storage.is_local(url):
        lines = [
            line if _is_complete(line) else storage.join(storage.parent(url), line)
            for line in lines
        ]
    return [shard for line in lines for shard in _expand(line, depth + 1)]


def _is_complete(line: str) -> bool:
    return line.startswith(("/", "@", "file:")) or "://" in line


def _shards_at(url: str) -> list[str]:
    """One address as a list: the shards of a folder, the matches of a wildcard, or itself."""
    if has_user(url):
        raise DataError(
            f"{storage.redact(url)} was given with a user or password, which cannot stand in a manifest; "
            f"leave them out, and {WHERE_KEYS_GO}"
        )
    if url.startswith("http") and "?" in url:
        raise DataError(
            f"{storage.redact(url)}?...: an address with a query cannot stand in a manifest, which would hand on "
            f"its key; use an address without, or s3:// with credentials in the environment"
        )
    has_magic = glob.has_magic(url) and not url.startswith("http")
    if not has_magic:
        if url.endswith(".tar") and not (
            storage.is_local(url) and storage.local_path(url).is_dir()
        ):
            return [url]
        if storage.is_local(url) and storage.local_path(url).is_file():
            return [str(storage.local_path(url))]
        return [
            storage.join(url, name) for name in storage.list_names(url) if name.endswith(".tar")
        ]
    if url.endswith("/**"):
        url += "/*.tar"
    if storage.is_local(url):
        matches = glob.glob(str(storage.local_path(url)), recursive=True)
        return sorted(name for name in matches if name.endswith(".tar"))
    return list(_matches(url))


def _matches(url: str) -> Iterator[str]:
    """The objects of a store that a wildcard means, sorted."""
    fixed, magic = url.split("/")[:3], url.split("/")[3:]
    if any(map(glob.has_magic, fixed)):
        raise DataError(f"{storage.redact(url)}: a wildcard cannot stand for a bucket")
    while not glob.has_magic(magic[0]):
        fixed.append(magic.pop(0))
    folder, wanted = "/".join(fixed), re.compile(_as_regex(magic))
    for name in storage.list_tree(folder):
        if name.endswith(".tar") and wanted.fullmatch(name):
            yield f"{folder}/{name}"


def _as_regex(parts: list[str]) -> str:
    """Shell wildcards as a regular expression: `*` and `?` stay within a folder, `**` does not."""
    text = ""
    for number, part in enumerate(parts):
        last = number == len(parts) - 1
        if part == "**" and not last:
            text += "(?:[^/]+/)*"
            continue
        for piece in re.findall(r"\[!?\]?[^]]*\]|.", part):
            if piece == "*":
                text += "[^/]*"
            elif piece == "?":
                text += "[^/]"
            elif len(piece) > 1:
                chosen = re.escape(piece[1:-1].removeprefix("!")).replace("\\-", "-")
                text += f"[^/{chosen}]" if piece[1] == "!" else f"[{chosen}]"
            else:
                text += re.escape(piece)
        text += "" if last else "/"
    return text
