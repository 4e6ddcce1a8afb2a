"""Expands folders, braces, wildcards and list files to addresses of shards.

data/train                         the .tar files of a folder, without sub-folders (use data/**)
s3://bucket/pairs-{000..127}.tar   braces: exactly these, also where listing is not possible
's3://bucket/*/part-??.tar'        wildcards, local or in a store; ** matches across folders
@shards.txt                        a file with one of these per line; # starts a comment
"""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator, Sequence

from data_pipeline.common import storage
from data_pipeline.common.addresses import CREDENTIALS_HINT, has_userinfo
from data_pipeline.common.errors import DataError

_MAX_LISTS = 8
"""Maximum nesting of list files."""


def expand_patterns(patterns: Sequence[str]) -> list[str]:
    """Addresses of the shards that match the patterns, in order and without duplicates.

    Raises:
        DataError: A pattern matches nothing.
        StorageError: A folder or list cannot be read.
    """
    urls: dict[str, None] = {}
    for pattern in patterns:
        urls.update(dict.fromkeys(_expand(pattern, 0)))
    return list(urls)


def _expand(pattern: str, depth: int) -> list[str]:
    if pattern.startswith("@"):
        return _read_list(pattern[1:], depth)
    shards = [shard for url in _braces(pattern) for shard in _shards_at(url)]
    if not shards:
        raise DataError(
            f"no shards at {storage.redact(pattern)}; give a folder with .tar files (FOLDER/** to "
            f"include its sub-folders), or their paths"
        )
    return shards


def _braces(pattern: str) -> list[str]:
    from braceexpand import braceexpand

    try:
        return list(braceexpand(pattern))
    except ValueError as error:
        raise DataError(
            f"{storage.redact(pattern)}: unbalanced braces; write {{000..127}}"
        ) from error


def _read_list(url: str, depth: int) -> list[str]:
    """The shards of a list file; names in a list in a store are relative to its folder."""
    if depth >= _MAX_LISTS:
        raise DataError(
            f"@{storage.redact(url)}: list files are nested more than {_MAX_LISTS} deep; check "
            f"whether they contain each other"
        )
    try:
        text = storage.read_bytes(url).decode()
    except UnicodeDecodeError as error:
        raise DataError(
            f"@{storage.redact(url)} is not a list file: it is not UTF-8 text; write one address "
            f"per line"
        ) from error
    lines = [line.partition(" #")[0].strip() for line in text.splitlines()]
    lines = [line for line in lines if line and not line.startswith("#")]
    if not lines:
        raise DataError(f"@{storage.redact(url)} lists no shards; write one address per line")
    if not storage.is_local(url):
        lines = [
            line if _is_complete(line) else storage.join(storage.parent(url), line)
            for line in lines
        ]
    return [shard for line in lines for shard in _expand(line, depth + 1)]


def _is_complete(line: str) -> bool:
    """Whether a line of a list is an address or another list, not a name in the list's folder."""
    return line.startswith(("/", "@", "file:")) or "://" in line


def _shards_at(url: str) -> list[str]:
    """The shards of a folder, the matches of a wildcard, or the address itself."""
    if has_userinfo(url):
        raise DataError(
            f"{storage.redact(url)} has a user or password, which must not be in a manifest; "
            f"remove it and {CREDENTIALS_HINT}"
        )
    if url.startswith("http") and "?" in url:
        raise DataError(
            f"{storage.redact(url)}?...: an address with a query must not be in a manifest, which "
            f"would expose its signature; use an address without a query, or s3:// with "
            f"credentials in the environment"
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
    """The objects of a store that match a wildcard, sorted."""
    fixed, magic = url.split("/")[:3], url.split("/")[3:]
    if any(map(glob.has_magic, fixed)):
        raise DataError(f"{storage.redact(url)}: the bucket cannot be a wildcard")
    while not glob.has_magic(magic[0]):
        fixed.append(magic.pop(0))
    folder, regex = "/".join(fixed), re.compile(_as_regex(magic))
    for name in storage.list_tree(folder):
        if name.endswith(".tar") and regex.fullmatch(name):
            yield f"{folder}/{name}"


def _as_regex(parts: list[str]) -> str:
    """Shell wildcards as a regular expression: `*` and `?` stay within a folder, `**` does not."""
    regex = ""
    for i, part in enumerate(parts):
        is_last = i == len(parts) - 1
        if part == "**" and not is_last:
            regex += "(?:[^/]+/)*"
            continue
        for token in re.findall(r"\[!?\]?[^]]*\]|.", part):
            regex += _token_regex(token)
        regex += "" if is_last else "/"
    return regex


def _token_regex(token: str) -> str:
    if token == "*":
        return "[^/]*"
    if token == "?":
        return "[^/]"
    if len(token) == 1:
        return re.escape(token)
    characters = re.escape(token[1:-1].removeprefix("!")).replace("\\-", "-")
    return f"[^/{characters}]" if token[1] == "!" else f"[{characters}]"
