"""Datasets prepared in a real S3 server: pictures, shards, results of parts and reports all lie
there."""

from __future__ import annotations

from pathlib import Path

import obstore
import pytest

from data_pipeline.common import storage
from data_pipeline.common.errors import DataError
from data_pipeline.order.drop import read_drop_list
from data_pipeline.preparing.corpus import captions_of
from data_pipeline.shards.manifest import load_manifest
from tests.support.data_commands import data
from tests.support.s3_server import BUCKET, S3Server
from tests.support.small_shards import caption, picture

pytestmark = [pytest.mark.e2e, pytest.mark.s3, pytest.mark.timeout(120)]

_COUNT = 23


@pytest.fixture
def bucket(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """A prefix of its own with `pairs.tsv` and most of its pictures."""
    for name, value in s3_server.env.items():
        monkeypatch.setenv(name, value)
    prefix = f"s3://{BUCKET}/{tmp_path.name}"
    lines = ["filepath\ttitle"] + [
        f"pics/{number}.png\t{caption(number)}" for number in range(_COUNT)
    ]
    storage.write_bytes(f"{prefix}/pairs.tsv", "\n".join(lines).encode())
    for number in range(1, _COUNT):
        storage.write_bytes(f"{prefix}/pics/{number}.png", picture(number))
    return prefix


def test_everything_works_on_a_store(
    s3_server: S3Server, bucket: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = f"{bucket}/shards"
    line = ("write", "csv", f"{bucket}/pairs.tsv", "--samples-per-shard", 6, "--max-left-out", 0.1)
    data(*line, "--out", out, "--part", "1/2", "--workers", 0)
    data(*line, "--out", out, "--workers", 2)
    assert "4 shards, 2 of them already there, 22 samples" in capsys.readouterr().out
    assert b"missing-picture" in storage.read_bytes(f"{out}/left-out.jsonl")
    manifest = load_manifest(out)

    # The same as on a disk.
    for number in range(1, _COUNT):
        (tmp_path / "pics").mkdir(exist_ok=True)
        (tmp_path / "pics" / f"{number}.png").write_bytes(picture(number))
    (tmp_path / "pairs.tsv").write_bytes(storage.read_bytes(f"{bucket}/pairs.tsv"))
    data(
        "write",
        "csv",
        tmp_path / "pairs.tsv",
        *line[3:],
        "--out",
        tmp_path / "local",
        "--workers",
        0,
    )
    assert load_manifest(tmp_path / "local").fingerprint() == manifest.fingerprint()

    assert list(captions_of([manifest], ["txt"])) == [
        caption(number) for number in range(1, _COUNT)
    ]
    drawn = list(captions_of([manifest], ["txt"], samples=5))
    assert len(drawn) == 5 and set(drawn) < {caption(number) for number in range(1, _COUNT)}
    capsys.readouterr()
    data("peek", out, "--index", 7)
    assert "pics/8\n" in capsys.readouterr().out
    data("dedup", out, "--work", f"{bucket}/work", "--html", f"{bucket}/page.html", "--workers", 0)
    assert b"<!doctype html>" in storage.read_bytes(f"{bucket}/page.html")

    assert data("check", out, "--decode", "--workers", 2) == 0
    entry = manifest.shards[2]
    content = bytearray(storage.read_bytes(manifest.shard_url(entry)))
    content[700] ^= 1
    storage.write_bytes(manifest.shard_url(entry), bytes(content))
    obstore.delete(
        s3_server.store(), manifest.shard_url(manifest.shards[3]).removeprefix(f"s3://{BUCKET}/")
    )
    assert data("check", out, "--drop-list", f"{bucket}/bad.json", "--workers", 0) == 1
    dropped = {
        name: row.samples for name, row in read_drop_list(f"{bucket}/bad.json").shards.items()
    }
    assert dropped == {entry.name: (0,)}, (
        "a shard that is away for now must not be dropped for good"
    )
    with pytest.raises(DataError, match="no such object"):
        list(captions_of([manifest], ["txt"]))


def test_a_folder_in_a_store_is_read_with_all_below_it(bucket: str, tmp_path: Path) -> None:
    for name in ("b/2", "a/c/1", "3"):
        storage.write_bytes(f"{bucket}/tree/{name}.png", picture(1))
        storage.write_bytes(f"{bucket}/tree/{name}.txt", name.encode())
    data("write", "folder", f"{bucket}/tree", "--out", tmp_path / "out", "--workers", 0)
    assert list(captions_of([load_manifest(tmp_path / "out")], ["txt"])) == ["3", "a/c/1", "b/2"]
