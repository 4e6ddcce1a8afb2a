"""The limit of open files: a process may have as many as its hard limit allows, and what it is like
to reach it."""

from __future__ import annotations

import contextlib
import errno
import resource

_OUT_OF_FILES = (errno.EMFILE, errno.ENFILE)
_DEEPEST = 8


def raise_limit() -> None:
    """Allow this process as many open files as it may allow itself (`ulimit -Hn`)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(
            OSError, ValueError
        ):  # some systems name a limit that they do not grant
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def is_out_of_files(error: BaseException | None) -> bool:
    """Whether an error, or one behind it, is that there are too many open files.

    A store's client says it in its own words, as it could not open a connection.
    """
    for _ in range(_DEEPEST):
        if error is None:
            return False
        if isinstance(error, OSError) and error.errno in _OUT_OF_FILES:
            return True
        if any(f"(os error {number})" in str(error) for number in _OUT_OF_FILES):
            return True
        error = error.__cause__ or error.__context__
    return False
