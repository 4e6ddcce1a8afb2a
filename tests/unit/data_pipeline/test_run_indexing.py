"""Which addresses of training data must be indexed, and which have a manifest."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_pipeline.shards.run_indexing import needs_indexing
from tests.support.small_shards import make_shards


@pytest.mark.parametrize(
    ("address", "expected"),
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
def test_addresses(address: str, expected: bool) -> None:
    assert needs_indexing(address) == expected


def test_folders(tmp_path: Path) -> None:
    make_shards(tmp_path / "indexed", count=7)
    assert not needs_indexing(str(tmp_path / "indexed"))
    (tmp_path / "indexed" / "manifest.json").unlink()
    assert needs_indexing(str(tmp_path / "indexed"))
    (tmp_path / "empty").mkdir()
    # Opening the manifest raises a more specific error for these.
    assert not needs_indexing(str(tmp_path / "empty"))
    assert not needs_indexing(str(tmp_path / "missing"))
