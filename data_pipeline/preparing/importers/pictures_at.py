"""Where the pictures are that a table or list names: below one folder, on a disk or in a store."""

from __future__ import annotations

import os
from pathlib import PurePosixPath

from data_pipeline.common import storage
from data_pipeline.common.errors import DataError


def picture_address(name: str, folder: str) -> str:
    """The address of the picture that a source calls `name`.

    Args:
        name: A path relative to `folder`, a whole path, or an address in a store.
        folder: What relative names are relative to; they cannot lead out of it.

    Raises:
        DataError: It is an address of the web, leads out of `folder`, or is no address
            (slug `web-address`, `bad-path`).
    """
    name = name.strip()
    if name.startswith(("http://", "https://")):
        raise DataError(
            "the picture is an address of the web; download with img2dataset first, and import its output",
            slug="web-address",
        )
    try:
        local = storage.is_local(name)
    except DataError as error:
        raise DataError(str(error), slug="bad-path") from error
    if not name or "\0" in name:
        raise DataError("the name of the picture is empty or has a zero byte", slug="bad-path")
    if not local or name.startswith("file:") or os.path.isabs(name):
        return name
    if ".." in PurePosixPath(name).parts:
        raise DataError(f"{name!r} leads out of {storage.redact(folder)}", slug="bad-path")
    return storage.join(folder, name)
