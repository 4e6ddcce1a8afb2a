"""Where shards lie as seen from their manifest: the folder of all of them, and their names in
it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import takewhile

from data_pipeline.common import storage
from data_pipeline.common.addresses import has_query, has_user
from data_pipeline.common.errors import DataError


def common_folder(urls: Sequence[str], out: str) -> str:
    """The folder that shards' names are relative to: `out` where it holds them all, else the
    innermost that does.

    Args:
        urls: The shards.
        out: The manifest's folder, or empty.

    Raises:
        DataError: There is none, or a manifest in `out` could not name it.
    """
    if out and all(_lies_under(url, out) for url in urls):
        return out.rstrip("/") or "/"
    folders = [storage.parent(url) for url in urls]
    if all(map(storage.is_local, urls)):
        if out or len({os.path.isabs(folder) for folder in folders}) > 1:
            folders = [os.path.abspath(folder) for folder in folders]
        if out and not storage.is_local(out):
            raise DataError(
                f"the shards are files of this machine, so their manifest cannot lie in "
                f"{storage.redact(out)}; copy them there first"
            )
        return os.path.commonpath(folders) or "."
    if any(map(storage.is_local, urls)) or len({tuple(url.split("/")[:3]) for url in urls}) > 1:
        raise DataError(
            f"the shards lie in different places ({storage.redact(urls[0])}, {storage.redact(urls[-1])}); index each "
            f"place by itself, and name all of their manifests in data.train"
        )
    # Levels on which all agree; the scheme and the bucket do.
    levels = zip(*(folder.split("/") for folder in folders), strict=False)
    return "/".join(level[0] for level in takewhile(lambda level: len(set(level)) == 1, levels))


def name_under(url: str, folder: str) -> str:
    """A shard's path relative to a folder.

    Raises:
        DataError: It does not lie in it.
    """
    if storage.is_local(url) and storage.is_local(folder):
        name = os.path.relpath(storage.local_path(url), storage.local_path(folder))
    else:
        name = url.removeprefix(f"{folder}/") if url.startswith(f"{folder}/") else ".."
    if ".." in name.split("/"):
        raise DataError(f"shard {storage.redact(url)} does not lie under {storage.redact(folder)}")
    return name


def is_same_folder(base: str, folder: str) -> bool:
    """Whether two addresses name one folder."""
    if storage.is_local(base) and storage.is_local(folder):
        return os.path.abspath(storage.local_path(base)) == os.path.abspath(
            storage.local_path(folder)
        )
    return base == folder


def base_folder(base: object, folder: str) -> str:
    """The shards' folder as an address, from what a manifest says about it.

    Args:
        base: An address, a path relative to the manifest's folder, or empty for that folder itself.
        folder: The manifest's.

    Raises:
        DataError: It is none, holds a user, password or query, or a manifest of a store names a
        place that is
            not in a store.
    """
    if not isinstance(base, str) or "\0" in base:
        raise DataError(f"its base is {base!r}, but should be the shards' folder")
    if not base or base == ".":
        return folder
    if has_user(base) or has_query(base):
        raise DataError(
            f"its base {storage.redact(base)} has a user, password or query, which must not stand in a "
            f"manifest; make it again with `vlmoe data index`, with the address without"
        )
    if not storage.is_local(base):
        return base.rstrip("/")
    if storage.is_local(folder):
        return os.path.normpath(storage.local_path(folder) / storage.local_path(base))
    if base.startswith(("/", "file:")):
        raise DataError(f"it lies in a store, but its base {base!r} is a folder of one machine")
    return _joined(folder, base)


def _lies_under(url: str, folder: str) -> bool:
    try:
        name_under(url, folder.rstrip("/") or "/")
    except DataError:
        return False
    return True


def _joined(folder: str, relative: str) -> str:
    """`folder/relative` in a store, where `..` means nothing to the server; it cannot leave the
    bucket."""
    scheme, _, path = folder.partition("://")
    bucket, *parts = path.split("/")
    for part in relative.split("/"):
        if part == ".." and not parts:
            raise DataError(f"its base {relative!r} leads out of the bucket")
        elif part == "..":
            parts.pop()
        elif part not in ("", "."):
            parts.append(part)
    return f"{scheme}://{'/'.join([bucket, *parts])}"
