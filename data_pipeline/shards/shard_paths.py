"""Locations of shards relative to their manifest: their common folder and their names in it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import takewhile

from data_pipeline.common import storage
from data_pipeline.common.addresses import has_query, has_userinfo
from data_pipeline.common.errors import DataError


def common_folder(urls: Sequence[str], out: str) -> str:
    """The folder that shard names are relative to: `out` if it contains all shards, else the
    innermost folder that does.

    Args:
        urls: The shards.
        out: The manifest's folder, or empty.

    Raises:
        DataError: There is no such folder, or a manifest in `out` could not refer to it.
    """
    if out and all(_is_under(url, out) for url in urls):
        return out.rstrip("/") or "/"
    folders = [storage.parent(url) for url in urls]

    if all(map(storage.is_local, urls)):
        if out or len({os.path.isabs(folder) for folder in folders}) > 1:
            folders = [os.path.abspath(folder) for folder in folders]
        if out and not storage.is_local(out):
            raise DataError(
                f"the shards are local files, so their manifest cannot be in "
                f"{storage.redact(out)}; copy them there first"
            )
        return os.path.commonpath(folders) or "."

    if any(map(storage.is_local, urls)) or len({tuple(url.split("/")[:3]) for url in urls}) > 1:
        raise DataError(
            f"the shards are in different buckets or on different hosts "
            f"({storage.redact(urls[0])}, {storage.redact(urls[-1])}); index each location "
            f"separately and list all manifests in data.train"
        )
    # The leading path components that all folders share; scheme and bucket are equal.
    components = zip(*(folder.split("/") for folder in folders), strict=False)
    shared = takewhile(lambda names: len(set(names)) == 1, components)
    return "/".join(names[0] for names in shared)


def relative_name(url: str, folder: str) -> str:
    """A shard's path relative to a folder.

    Raises:
        DataError: The shard is not in the folder.
    """
    if storage.is_local(url) and storage.is_local(folder):
        name = os.path.relpath(storage.local_path(url), storage.local_path(folder))
    else:
        name = url.removeprefix(f"{folder}/") if url.startswith(f"{folder}/") else ".."
    if ".." in name.split("/"):
        raise DataError(f"shard {storage.redact(url)} is not in {storage.redact(folder)}")
    return name


def is_same_folder(base: str, folder: str) -> bool:
    """Whether two addresses refer to the same folder."""
    if storage.is_local(base) and storage.is_local(folder):
        paths = (storage.local_path(base), storage.local_path(folder))
        return os.path.abspath(paths[0]) == os.path.abspath(paths[1])
    return base == folder


def resolve_base(base: object, folder: str) -> str:
    """The address of the shards' folder from the `base` of a manifest.

    Args:
        base: An address, a path relative to the manifest's folder, or empty for that folder.
        folder: The manifest's folder.

    Raises:
        DataError: It is not an address, contains a user, password or query, or is a local folder
            although the manifest is in a store.
    """
    if not isinstance(base, str) or "\0" in base:
        raise DataError(f"its base is {base!r}, but should be the shards' folder")
    if not base or base == ".":
        return folder
    if has_userinfo(base) or has_query(base):
        raise DataError(
            f"its base {storage.redact(base)} has a user, password or query, which must not be in "
            f"a manifest; create it again with `vlmoe data index`, using the address without them"
        )
    if not storage.is_local(base):
        return base.rstrip("/")
    if storage.is_local(folder):
        return os.path.normpath(storage.local_path(folder) / storage.local_path(base))
    if base.startswith(("/", "file:")):
        raise DataError(f"it is in a store, but its base {base!r} is a local folder")
    return _join_in_store(folder, base)


def _is_under(url: str, folder: str) -> bool:
    try:
        relative_name(url, folder.rstrip("/") or "/")
    except DataError:
        return False
    return True


def _join_in_store(folder: str, relative: str) -> str:
    """`folder/relative` with `..` resolved, because stores do not; it cannot leave the bucket."""
    scheme, _, path = folder.partition("://")
    bucket, *parts = path.split("/")
    for part in relative.split("/"):
        if part == ".." and not parts:
            raise DataError(f"its base {relative!r} is outside of the bucket")
        elif part == "..":
            parts.pop()
        elif part not in ("", "."):
            parts.append(part)
    return f"{scheme}://{'/'.join([bucket, *parts])}"
