"""Preparing datasets in an S3 server: images, shards, results of parts, and reports."""

from __future__ import annotations

from pathlib import Path

import obstore
import pytest

from data_pipeline.common import storage
from data_pipeline.common.errors import DataError
from data_pipeline.order.drop_list import read_drop_list
from data_pipeline.preparing.caption_stream import iter_captions
from data_pipeline.shards.manifest import load_manifest
from tests.support.data_commands import run_data_command
from tests.support.s3_server import BUCKET, S3Server
from tests.support.small_shards import make_caption, make_png

pytestmark = [pytest.mark.e2e, pytest.mark.s3, pytest.mark.timeout(120)]

COUNT = 23
"""Rows of pairs.tsv; the image of the first one is missing."""
CAPTIONS = [make_caption(i) for i in range(1, COUNT)]


@pytest.fixture
def prefix(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """A prefix in the store with `pairs.tsv` and all but one of its images."""
    for name, value in s3_server.env.items():
        monkeypatch.setenv(name, value)
    prefix = f"s3://{BUCKET}/{tmp_path.name}"
    rows = [f"pics/{i}.png\t{make_caption(i)}" for i in range(COUNT)]
    storage.write_bytes(f"{prefix}/pairs.tsv", "\n".join(["filepath\ttitle", *rows]).encode())
    for i in range(1, COUNT):
        storage.write_bytes(f"{prefix}/pics/{i}.png", make_png(i))
    return prefix


def test_commands_on_a_store(
    s3_server: S3Server, prefix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, source = f"{prefix}/shards", f"{prefix}/pairs.tsv"
    options = ("--samples-per-shard", 6, "--max-skipped-ratio", "0.1")
    run_data_command(
        "write", "csv", source, *options, "--out", out, "--part", "1/2", "--workers", 0
    )
    run_data_command("write", "csv", source, *options, "--out", out, "--workers", 2)
    assert "4 shards, 2 of them already written, 22 samples" in capsys.readouterr().out
    assert b"missing-image" in storage.read_bytes(f"{out}/skipped.jsonl")
    manifest = load_manifest(out)

    # Equal to shards of local files.
    (tmp_path / "pics").mkdir()
    for i in range(1, COUNT):
        (tmp_path / "pics" / f"{i}.png").write_bytes(make_png(i))
    (tmp_path / "pairs.tsv").write_bytes(storage.read_bytes(source))
    local = tmp_path / "local"
    run_data_command(
        "write", "csv", tmp_path / "pairs.tsv", *options, "--out", local, "--workers", 0
    )
    assert load_manifest(local).fingerprint() == manifest.fingerprint()

    assert list(iter_captions([manifest], ["txt"])) == CAPTIONS
    sampled = list(iter_captions([manifest], ["txt"], samples=5))
    assert len(sampled) == 5 and set(sampled) < set(CAPTIONS)

    capsys.readouterr()
    run_data_command("peek", out, "--index", 7)
    assert "pics/8\n" in capsys.readouterr().out
    html = f"{prefix}/report.html"
    run_data_command("dedup", out, "--work-dir", f"{prefix}/work", "--html", html, "--workers", 0)
    assert b"<!doctype html>" in storage.read_bytes(html)


def test_check_of_a_store(s3_server: S3Server, prefix: str) -> None:
    out, drop_list = f"{prefix}/shards", f"{prefix}/drop.json"
    options = ("--samples-per-shard", 6, "--max-skipped-ratio", "0.1", "--workers", 0)
    run_data_command("write", "csv", f"{prefix}/pairs.tsv", *options, "--out", out)
    manifest = load_manifest(out)
    assert run_data_command("check", out, "--decode", "--workers", 2) == 0

    corrupt, missing = manifest.shards[2], manifest.shards[3]
    content = bytearray(storage.read_bytes(manifest.shard_url(corrupt)))
    content[700] ^= 1
    storage.write_bytes(manifest.shard_url(corrupt), bytes(content))
    path = manifest.shard_url(missing).removeprefix(f"s3://{BUCKET}/")
    obstore.delete(s3_server.store(), path)
    assert run_data_command("check", out, "--drop-list", drop_list, "--workers", 0) == 1

    # The missing shard may be unavailable only temporarily, so its samples are not dropped.
    shards = read_drop_list(drop_list).shards
    assert {name: row.samples for name, row in shards.items()} == {corrupt.name: (0,)}
    with pytest.raises(DataError, match="no such object"):
        list(iter_captions([manifest], ["txt"]))


def test_folder_is_read_recursively(prefix: str, tmp_path: Path) -> None:
    for name in ("b/2", "a/c/1", "3"):
        storage.write_bytes(f"{prefix}/tree/{name}.png", make_png(1))
        storage.write_bytes(f"{prefix}/tree/{name}.txt", name.encode())
    run_data_command("write", "folder", f"{prefix}/tree", "--out", tmp_path / "out", "--workers", 0)
    captions = iter_captions([load_manifest(tmp_path / "out")], ["txt"])
    assert list(captions) == ["3", "a/c/1", "b/2"]
