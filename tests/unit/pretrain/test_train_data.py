"""Which addresses of training data must be indexed, and which have a manifest."""

from __future__ import annotations

from pathlib import Path

import pytest

from pretrain.config.schema import RunConfig
from pretrain.train.data import _needs_indexing
from tests.support.small_shards import make_shards


@pytest.mark.parametrize(
    ("address", "needs_indexing"),
    [
        ("https://host/manifest.json?sig=1", False),
        ("https://host/pairs/manifest.json", False),
        ("https://host/000.tar?sig=1", True),
        ("s3://bucket/{000..003}.tar", True),
        ("@shards.txt", True),
        ("data/*.tar", True),
        ("data/000.tar", True),
    ],
)
def test_addresses(address: str, needs_indexing: bool) -> None:
    assert _needs_indexing(address, RunConfig()) == needs_indexing


def test_folders(tmp_path: Path) -> None:
    make_shards(tmp_path / "indexed", count=7)
    assert not _needs_indexing(str(tmp_path / "indexed"), RunConfig())
    (tmp_path / "indexed" / "manifest.json").unlink()
    assert _needs_indexing(str(tmp_path / "indexed"), RunConfig())
    (tmp_path / "empty").mkdir()
    # Opening the manifest raises a more specific error for these.
    assert not _needs_indexing(str(tmp_path / "empty"), RunConfig())
    assert not _needs_indexing(str(tmp_path / "missing"), RunConfig())
