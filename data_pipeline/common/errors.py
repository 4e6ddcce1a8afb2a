"""The errors that a person, a file or a cluster can cause: one family, one class per kind.

A message says what was found, what was expected, where it was set and what to do. The command
line prints `error: ...` for these and leaves with status 2; anything else is a bug and shows a
traceback.
"""


class VlmError(Exception):
    """Something outside the program is wrong, and the message says how to mend it."""


class ConfigError(VlmError):
    """A setting is unknown, impossible, or contradicts another."""


def require(condition: bool, message: str) -> None:
    """What a setting must fulfil.

    Raises:
        ConfigError: It does not; `message` says what was found and what is possible.
    """
    if not condition:
        raise ConfigError(message)


class DataError(VlmError):
    """A shard, manifest, picture or caption is missing or damaged."""

    def __init__(self, message: str, *, slug: str = "") -> None:
        """Say what is damaged.

        Args:
            message: What was found, where, and what to do.
            slug: The kind of damage in one word of lower case and dashes (`bad-image`), by which
                bad samples are counted; empty where nothing is counted.
        """
        super().__init__(message)
        self.slug = slug


class StorageError(DataError):
    """A file or object cannot be read or written."""

    def __init__(self, message: str, *, slug: str = "", kind: str = "") -> None:
        """Say what cannot be read or written.

        Args:
            message: As for `DataError`.
            slug: As for `DataError`.
            kind: One of `store_errors.Kind` where a store is the cause, for programs; empty
                otherwise.
        """
        super().__init__(message, slug=slug)
        self.kind = kind


class TokenizerError(DataError):
    """The tokenizer is missing, damaged, or not the one this run was trained with."""


class CheckpointError(VlmError):
    """A checkpoint cannot be written, is damaged, or belongs to another layout."""


class LayoutError(VlmError):
    """The ranks that were started do not fit the run."""


class LostRankError(VlmError):
    """Ranks cannot talk to each other any more, most often because one of them has ended."""
