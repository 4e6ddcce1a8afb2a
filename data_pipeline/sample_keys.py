"""Where a sample's image and captions are: by exact extension, from lists of keys.

A sample is the files with the same name up to the first dot, as in WebDataset. The image is the
file whose extension is one of the image keys: with the key `jpg`, `0000.depth.jpg` is not the image
of the sample `0000`; with the key `depth.jpg` it is. A sample with two candidates, and one that
seems to hold several samples (`fox.jpg`, `fox.txt`, `fox.2.jpg`, `fox.2.txt`), is not used: the
wrong image or caption would be trained.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from data_pipeline.common.errors import ConfigError, DataError

if TYPE_CHECKING:
    from data_pipeline.samples import RawSample  # imports torch

TEXT_EXTENSIONS = frozenset(("txt", "text", "caption"))
"""Files that may hold a caption, by the last part of their extension."""

IMAGE_KEYS = (
    "jpg",
    "jpeg",
    "jpe",
    "jfif",
    "pjpeg",
    "png",
    "apng",
    "webp",
    "bmp",
    "dib",
    "gif",
    "tif",
    "tiff",
    "ppm",
    "pgm",
    "pbm",
    "pnm",
    "jp2",
    "j2k",
    "avif",
    "heic",
    "heif",
    "jxl",
    "img",
    "image",
)
"""Extensions of image files; the format is determined by the content of the file."""


_IMAGES = frozenset(IMAGE_KEYS)
_KEY = re.compile(r"[^\s./:]+(\.[^\s./:]+)*")


class SampleKeys(NamedTuple):
    """Where a sample's image and captions are."""

    images: tuple[str, ...] = IMAGE_KEYS
    """As `data.image_keys`."""
    captions: tuple[str, ...] = ("txt",)
    """As `data.caption_keys`."""


DEFAULT_KEYS = SampleKeys()


def image_keys_problem(keys: Sequence[str]) -> str:
    """What is wrong with image keys; empty if they are valid."""
    wrong = [key for key in keys if key != key.lower() or not _KEY.fullmatch(key)]
    if keys and not wrong:
        return ""
    found = f"{wrong[0]!r} is not a key" if wrong else "there is none"
    return f"{found}; name extensions in lower case without the first dot: jpg, left.png"


def check_image_keys(keys: Sequence[str]) -> None:
    """Validate image keys.

    Raises:
        ConfigError: There is none, or one is not an extension in lower case.
    """
    if problem := image_keys_problem(keys):
        raise ConfigError(f"image keys: {problem}")


def image_bytes(raw: RawSample, keys: Sequence[str] = IMAGE_KEYS) -> bytes:
    """The sample's image file.

    Raises:
        DataError: There is no image or no unique one; for slugs see `image_problem`.
    """
    return raw.members[image_extension(tuple(raw.members), tuple(keys))]


@lru_cache(maxsize=4096)
def image_extension(extensions: tuple[str, ...], keys: tuple[str, ...]) -> str:
    """The extension of the image among those of a sample.

    Raises:
        DataError: As for `image_bytes`.
    """
    if problem := image_problem(extensions, keys):
        raise DataError(problem[1], slug=problem[0])
    return next(extension for extension in extensions if extension in keys)


def image_problem(extensions: Iterable[str], keys: Sequence[str]) -> tuple[str, str] | None:
    """Why a sample has no unique image.

    Args:
        extensions: Of its files, in lower case.
        keys: The image keys.

    Returns:
        None, or slug and description: `no-image`, `several-images` (two files have image keys), or
        `several-samples` (a further name has both an image and a text).
    """
    extensions = tuple(extensions)
    files = ", ".join(extensions) or "none"
    candidates = [extension for extension in extensions if extension in keys]
    if len(candidates) > 1:
        return (
            "several-images",
            f"{' and '.join(candidates)} are all in data.image_keys; keep the one to use",
        )

    name = _name(candidates[0]) if candidates else None
    pairs = [other for other in _names_of_pairs(extensions) if other != name]
    if len(pairs) > (0 if candidates else 1):
        return (
            "several-samples",
            f"its files are {files}: a name ends at its first dot, so several samples have the "
            f"same key; replace the other dots in the file names",
        )
    if not candidates:
        others = [extension for extension in extensions if _last(extension) in IMAGE_KEYS]
        hint = f"; to use {others[0]}, add it to data.image_keys" if others else ""
        return "no-image", f"no image among its files: {files}{hint}"
    return None


def _names_of_pairs(extensions: Sequence[str]) -> list[str]:
    """The names (`2` of `2.jpg`) that have both an image and a text."""
    kinds: dict[str, set[str]] = {}
    for extension in extensions:
        kinds.setdefault(_name(extension), set()).add(_last(extension))
    return [name for name, ends in kinds.items() if ends & _IMAGES and ends & TEXT_EXTENSIONS]


def _last(extension: str) -> str:
    """`2.jpg` -> `jpg`."""
    return extension.rpartition(".")[2]


def _name(extension: str) -> str:
    """`2.jpg` -> `2`; empty for `jpg`."""
    return extension.rpartition(".")[0]
