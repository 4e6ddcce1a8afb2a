"""Resolves the image names in a table or list against the image folder."""

from __future__ import annotations

import os
from pathlib import PurePosixPath

from data_pipeline.common import storage
from data_pipeline.common.errors import DataError


def resolve_image_url(name: str, folder: str) -> str:
    """The path or URL of an image.

    Args:
        name: A path relative to `folder`, an absolute path, or the URL of an object.
        folder: Base of relative names; a relative name cannot refer to a file outside it.

    Raises:
        DataError: The name is a web address (slug `web-address`), is outside `folder`, or is not
            a valid path or URL (`invalid-path`).
    """
    name = name.strip()
    if name.startswith(("http://", "https://")):
        raise DataError(
            "the image is a web address; download it first with img2dataset, then import its "
            "output",
            slug="web-address",
        )

    try:
        is_local = storage.is_local(name)
    except DataError as error:
        raise DataError(str(error), slug="invalid-path") from error

    if not name or "\0" in name:
        raise DataError("the image name is empty or contains a null byte", slug="invalid-path")
    if not is_local or name.startswith("file:") or os.path.isabs(name):
        return name
    if ".." in PurePosixPath(name).parts:
        raise DataError(f"{name!r} is outside {storage.redact(folder)}", slug="invalid-path")
    return storage.join(folder, name)
