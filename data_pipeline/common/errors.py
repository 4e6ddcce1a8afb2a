"""Exceptions for problems with input, files or the cluster: one base class, one class per kind.

A message states what was given, what was expected, where it was set and what to do. The command
line prints `error: ...` for these and exits with status 2; any other exception is a bug and is
shown with its traceback. Classes for one part of the program are defined in that part.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence


class VlmError(Exception):
    """Base class: the problem is outside the program, and the message says how to fix it."""


def error_values(error: VlmError) -> list[str]:
    """Class and message of an error as JSON values, to send it to another process."""
    return [type(error).__module__, type(error).__name__, str(error)]


def error_from_values(values: Sequence[str]) -> VlmError:
    """The inverse of `error_values`; a `VlmError` if the class is not imported in this process."""
    module, name, message = values
    error_class = getattr(sys.modules.get(module), name, VlmError)
    is_error = isinstance(error_class, type) and issubclass(error_class, VlmError)
    return error_class(message) if is_error else VlmError(message)


class ConfigError(VlmError):
    """A setting is unknown, out of range, or contradicts another one."""


class DataError(VlmError):
    """A shard, manifest, image or caption is missing or corrupt."""

    def __init__(self, message: str, *, slug: str = "") -> None:
        """Create the error.

        Args:
            message: What is wrong, where, and what to do.
            slug: Machine-readable reason in lower case and dashes (`corrupt-image`), by which
                skipped samples are counted; empty where nothing is counted.
        """
        super().__init__(message)
        self.slug = slug


class StorageError(DataError):
    """A file or object cannot be read or written."""

    def __init__(self, message: str, *, slug: str = "", kind: str = "") -> None:
        """Create the error.

        Args:
            message: As for `DataError`.
            slug: As for `DataError`.
            kind: The `store_errors.ErrorKind` if an object store caused the error, else empty.
        """
        super().__init__(message, slug=slug)
        self.kind = kind
