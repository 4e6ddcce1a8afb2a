"""Expands folders, braces, wildcards and list files to addresses of shards.

data/train                         the .tar files of a folder, without sub-folders (use data/**)
s3://bucket/pairs-{000..127}.tar   braces: exactly these, also where listing is not possible
's3://bucket/*/part-??.tar'        wildcards, local or in a store; ** matches across folders
@shards.txt                        a file with one of these per line; # starts a comment at the
                                   beginning of a line or after a blank

A local path that exists is never a pattern, also if its name has braces or wildcards. `.TAR` is a
shard too. Other files are counted; compressed archives are also named in a warning.
"""

from __future__ import annotations

import glob
import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from data_pipeline.common import storage
from data_pipeline.common.addresses import CREDENTIALS_HINT, has_userinfo
from data_pipeline.common.errors import DataError
from data_pipeline.common.escaping import escape_control
from data_pipeline.common.literal_paths import split_literal
from data_pipeline.common.tables import counted, join_counts
from data_pipeline.shards.compression import compressed_suffix, how_to_decompress
from data_pipeline.shards.manifest import MANIFEST_NAME, SKIPPED_NAME
from data_pipeline.shards.shard_index import INDEX_SUFFIX

logger = logging.getLogger(__name__)

_MAX_LISTS = 8
"""Maximum nesting of list files."""


class FoundShards(NamedTuple):
    """The shards that match patterns, and the other files."""

    urls: list[str]
    """In order, without duplicates."""
    ignored: dict[str, int]
    """Number of other files in the folders and among the matches, by rule: `hidden file`,
    `.gz file` ... Manifests, and indices of these shards, are not counted."""


def find_shards(patterns: Sequence[str]) -> FoundShards:
    """The shards that match the patterns.

    Raises:
        DataError: A pattern matches nothing.
        StorageError: A folder or list cannot be read.
    """
    urls: dict[str, None] = {}
    others: dict[str, str] = {}
    for pattern in patterns:
        urls.update(dict.fromkeys(_expand(pattern, 0, others)))
    return FoundShards(list(urls), dict(Counter(others.values())))


def expand_patterns(patterns: Sequence[str]) -> list[str]:
    """Addresses of the shards of `find_shards`."""
    return find_shards(patterns).urls


def _expand(pattern: str, depth: int, others: dict[str, str]) -> list[str]:
    """The shards of one pattern; adds the other files that it matches to `others`, with the rule
    by which they are ignored."""
    if pattern.startswith("@"):
        return _read_list(pattern[1:], depth, others)
    matched: dict[str, str] = {}
    shards = [shard for url in expand_braces(pattern) for shard in _shards_at(url, matched)]
    others |= matched
    if not shards:
        found = f" (ignored: {join_counts(Counter(matched.values()))})" if matched else ""
        raise DataError(
            f"no shards at {storage.redact(pattern)}{found}; give a folder with .tar files "
            f"(FOLDER/** to include its sub-folders), or their paths"
        )
    return shards


def expand_braces(pattern: str) -> list[str]:
    """The addresses that braces stand for; braces in the name of an existing local path are kept.

    Raises:
        DataError: The braces are unbalanced.
    """
    from braceexpand import braceexpand

    path, rest = split_literal(pattern)
    try:
        return [path + text for text in braceexpand(rest)] if rest else [path]
    except ValueError as error:
        raise DataError(
            f"{storage.redact(pattern)}: unbalanced braces; write {{000..127}}"
        ) from error


def _read_list(url: str, depth: int, others: dict[str, str]) -> list[str]:
    """The shards of a list file; names in a list in a store are relative to its folder."""
    if depth >= _MAX_LISTS:
        raise DataError(
            f"@{storage.redact(url)}: list files are nested more than {_MAX_LISTS} deep; check "
            f"whether they contain each other"
        )
    try:
        text = storage.read_bytes(url).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"@{storage.redact(url)} is not a list file: it is not UTF-8 text; write one address "
            f"per line"
        ) from error
    # Not splitlines(): file names may have its rarer line breaks, such as U+2028.
    found = (_listed_address(line, storage.is_local(url)) for line in re.split(r"[\r\n]+", text))
    lines = [line for line in found if line]
    if not lines:
        raise DataError(f"@{storage.redact(url)} lists no shards; write one address per line")
    if not storage.is_local(url):
        lines = [
            line if _is_complete(line) else storage.join(storage.parent(url), line)
            for line in lines
        ]
    return [shard for line in lines for shard in _expand(line, depth + 1, others)]


def _listed_address(line: str, is_local: bool) -> str:
    """The address in a line of a list; empty for a blank line or a comment.

    In a local list, a line that is an existing path is taken literally.
    """
    for path in (line, line.strip()):
        if is_local and path and not split_literal(path)[1]:
            return path
    return "" if line.lstrip().startswith("#") else line.partition(" #")[0].strip()


def _is_complete(line: str) -> bool:
    """Whether a line of a list is an address or another list, not a name in the list's folder."""
    return line.startswith(("/", "@", "file:")) or "://" in line


def _shards_at(url: str, others: dict[str, str]) -> list[str]:
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
    if glob.has_magic(split_literal(url)[1]) and not url.startswith("http"):
        return _only_shards(_matches(url), url, others)
    if _is_file(url):
        return [str(storage.local_path(url))] if storage.is_local(url) else [url]
    files = [storage.join(url, name) for name in storage.list_names(url)]
    if storage.is_local(url):
        others |= {
            storage.join(url, entry.name): "link to a missing file"
            for entry in os.scandir(storage.local_path(url))
            if entry.is_symlink() and not os.path.exists(entry.path)
        }
    return _only_shards(files, url, others)


def _is_file(url: str) -> bool:
    """Whether an address is that of an archive, not of a folder."""
    is_archive = is_shard_name(url) or compressed_suffix(url)
    if not storage.is_local(url):
        return bool(is_archive)
    path = storage.local_path(url)
    return not path.is_dir() if is_archive else path.is_file()


def is_shard_name(name: str) -> bool:
    """Whether a file is a shard by its name; `._x.tar` is metadata of macOS."""
    return name.lower().endswith(".tar") and not name.rpartition("/")[2].startswith("._")


def _only_shards(names: Iterable[str], pattern: str, others: dict[str, str]) -> list[str]:
    """The shards among files; the compressed archives are named in a warning.

    Adds the other files to `others`.

    Raises:
        DataError: There are compressed archives, but no shards.
    """
    names = list(names)
    shards = [name for name in names if is_shard_name(name)]
    own = {f"{shard.rpartition('/')[2]}{INDEX_SUFFIX}" for shard in shards}
    own |= {MANIFEST_NAME, SKIPPED_NAME}
    for name in names:
        if not is_shard_name(name) and name.rpartition("/")[2] not in own and not _is_folder(name):
            others[name] = _ignoring_rule(name)
    compressed = [name for name in names if compressed_suffix(name)]
    if not compressed:
        return shards

    suffix = compressed_suffix(compressed[0])
    found = (
        f"{storage.redact(pattern)} has {counted(len(compressed), 'compressed archive')} "
        f"({join_counts(Counter(map(compressed_suffix, compressed)))}), such as "
        f"{escape_control(storage.redact(compressed[0]))}"
    )
    if not shards:
        raise DataError(
            f"{found}, but no shards (.tar): a sample cannot be read from a compressed archive; "
            f"{how_to_decompress(suffix)}"
        )
    logger.warning(
        "%s: only the %s indexed (.tar); to use a compressed one, %s",
        found,
        counted(len(shards), "shard is", "shards are"),
        how_to_decompress(suffix),
    )
    return shards


def _is_folder(name: str) -> bool:
    return storage.is_local(name) and storage.local_path(name).is_dir()


def _ignoring_rule(url: str) -> str:
    name = url.rpartition("/")[2]
    if name.startswith("."):
        return "hidden file"
    extension = name.rpartition(".")[2].lower() if "." in name else ""
    return f".{extension} file" if extension else "other file"


def _matches(url: str) -> list[str]:
    """The files that match a wildcard, sorted."""
    if url.endswith("/**"):
        url += "/*"
    if storage.is_local(url):
        path, rest = split_literal(str(storage.local_path(url)))
        return sorted(glob.glob(glob.escape(path) + rest, recursive=True))
    fixed, magic = url.split("/")[:3], url.split("/")[3:]
    if any(map(glob.has_magic, fixed)):
        raise DataError(f"{storage.redact(url)}: the bucket cannot be a wildcard")
    while not glob.has_magic(magic[0]):
        fixed.append(magic.pop(0))
    folder, regex = "/".join(fixed), re.compile(_as_regex(magic))
    return [f"{folder}/{name}" for name in storage.list_tree(folder) if regex.fullmatch(name)]


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
