"""Recognizes compressed archives, by name and content: training reads single samples of a shard,
which is not possible in them."""

from __future__ import annotations

from data_pipeline.common.errors import DataError

_BY_CONTENT = (
    (b"\x1f\x8b", ".gz"),
    (b"BZh", ".bz2"),
    (b"\xfd7zXZ\0", ".xz"),
    (b"\x28\xb5\x2f\xfd", ".zst"),
    (b"\x04\x22\x4d\x18", ".lz4"),
    (b"PK\3\4", ".zip"),
    (b"7z\xbc\xaf\x27\x1c", ".7z"),
    (b"Rar!\x1a\x07", ".rar"),
)
"""Suffix of compressed files by their first bytes."""

_TOOLS = {
    ".gz": "gunzip",
    ".tgz": "gunzip",
    ".bz2": "bunzip2",
    ".tbz2": "bunzip2",
    ".tbz": "bunzip2",
    ".xz": "unxz",
    ".txz": "unxz",
    ".zst": "unzstd",
    ".tzst": "unzstd",
    ".lz4": "unlz4",
}
"""Programs that replace a compressed tar archive by a plain one."""
_OTHER_ARCHIVES = (".zip", ".7z", ".rar")


def compressed_suffix(name: str) -> str:
    """The suffix of a compressed archive (`.tgz`, `.gz` of `.tar.gz`), empty for other files."""
    name = name.lower()
    stem, dot, last = name.rpartition(".")
    suffix = dot + last
    if suffix in _OTHER_ARCHIVES or (suffix in _TOOLS and suffix.startswith(".t")):
        return suffix
    return suffix if suffix in _TOOLS and stem.endswith(".tar") else ""


def how_to_decompress(suffix: str) -> str:
    """What to do with an archive of this suffix."""
    if tool := _TOOLS.get(suffix):
        return f"decompress it with `{tool}`"
    return "extract it and write its files as a .tar archive, sorted by name"


def check_not_compressed(beginning: bytes, where: str) -> None:
    """Reject a compressed archive, whatever its name is.

    Args:
        beginning: The first bytes of the file.
        where: Its name, for messages.

    Raises:
        DataError: It is compressed (slug `unsupported-tar`).
    """
    for signature, suffix in _BY_CONTENT:
        if beginning.startswith(signature):
            renamed = "" if compressed_suffix(where) else f" (its name should end in {suffix})"
            raise DataError(
                f"{where} is a {suffix} archive, not a plain .tar{renamed}: "
                f"{how_to_decompress(suffix)}",
                slug="unsupported-tar",
            )
