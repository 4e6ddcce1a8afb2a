"""The limit on open files of a process: raising it, and recognizing that it was reached."""

from __future__ import annotations

import contextlib
import errno
import resource

_ERRNOS = (errno.EMFILE, errno.ENFILE)
_MAX_CHAIN = 8
"""How many causes of an exception are followed."""


def raise_open_file_limit() -> None:
    """Raise the soft limit on open files to the hard limit (`ulimit -Hn`)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        # Some systems report a hard limit that they do not grant.
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def is_too_many_open_files(error: BaseException | None) -> bool:
    """Whether an exception, or one of its causes, means that the limit on open files was reached.

    The client of an object store reports it only in its message, as a connection that could not be
    opened.
    """
    for _ in range(_MAX_CHAIN):
        if error is None:
            return False
        if isinstance(error, OSError) and error.errno in _ERRNOS:
            return True
        if any(f"(os error {number})" in str(error) for number in _ERRNOS):
            return True
        error = error.__cause__ or error.__context__
    return False
