"""Names of files and folders that look like patterns: `photos [2020]`, `a{1}.tar`, `what?`.

A local path that exists means that file or folder; only what follows it is a pattern.
"""

from __future__ import annotations

import os
import re

from data_pipeline.common import storage
from data_pipeline.common.errors import StorageError

PATTERN_CHARACTERS = re.compile(r"[*?\[{]")


def split_literal(address: str) -> tuple[str, str]:
    """The longest beginning of an address, up to a slash, that is an existing local path; the rest.

    `photos [2020]/{000..127}.tar` is divided into `photos [2020]` and `/{000..127}.tar` if there is
    such a folder. The beginning is empty for an address in a store; the rest is empty for a path
    that exists.
    """
    if not _is_local(address):
        return "", address
    parts = address.split("/")
    for end in range(len(parts), 0, -1):
        beginning = "/".join(parts[:end])
        if _is_local(beginning) and os.path.exists(storage.local_path(beginning)):
            return beginning, address[len(beginning) :]
    return "", address


def is_pattern(address: str) -> bool:
    """Whether an address has wildcards or braces that are not in the name of an existing path."""
    return PATTERN_CHARACTERS.search(split_literal(address)[1]) is not None


def _is_local(address: str) -> bool:
    try:
        return bool(address) and storage.is_local(address)
    except StorageError:  # reported where the address is opened
        return False
