"""Which addresses are shards to be counted, and which have a manifest."""

from __future__ import annotations

from pathlib import Path

import pytest

from pretrain.config.schema import RunConfig
from pretrain.train.data import _must_be_counted
from tests.support.small_shards import make_shards


@pytest.mark.parametrize(
    ("address", "counted"),
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
def test_addresses(address: str, counted: bool) -> None:
    assert _must_be_counted(address, RunConfig()) == counted


def test_folders(tmp_path: Path) -> None:
    make_shards(tmp_path / "known", count=7)
    assert not _must_be_counted(str(tmp_path / "known"), RunConfig())
    (tmp_path / "known" / "manifest.json").unlink()
    assert _must_be_counted(str(tmp_path / "known"), RunConfig())
    (tmp_path / "empty").mkdir()
    assert not _must_be_counted(str(tmp_path / "empty"), RunConfig()), (
        "the manifest's own error says more"
    )
    assert not _must_be_counted(str(tmp_path / "nowhere"), RunConfig())
