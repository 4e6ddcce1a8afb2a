"""Exceptions for problems with input, files or the cluster: one base class, one class per kind.

A message states what was given, what was expected, where it was set and what to do. The command
line prints `error: ...` for these and exits with status 2; any other exception is a bug and is
shown with its traceback. Classes for one part of the program are defined in that part.
"""


class VlmError(Exception):
    """Base class: the problem is outside the program, and the message says how to fix it."""


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
