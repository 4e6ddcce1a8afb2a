"""WebDataset shards for training: preparing, checking, and loading in a reproducible order."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

__all__ = ["__version__"]

try:
    __version__ = version("vlmoe")  # from pyproject.toml, the only place that states it
except PackageNotFoundError:  # a source tree that is not installed
    __version__ = "0+unknown"
