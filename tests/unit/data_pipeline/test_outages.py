"""Data preparation while shards are unavailable: an outage is not corruption, and has no lasting
effect."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from data_pipeline.common import object_store
from data_pipeline.common.errors import DataError, StorageError
from data_pipeline.common.store_errors import ErrorKind
from data_pipeline.order.drop_list import read_drop_list
from data_pipeline.preparing.caption_stream import iter_captions
from data_pipeline.preparing.filtering import filter_samples
from data_pipeline.preparing.importers.table import Table
from data_pipeline.preparing.stats import compute_stats
from data_pipeline.preparing.write import WritePlan, write_dataset
from data_pipeline.settings import FilterConfig
from tests.support.data_commands import run_data_command
from tests.support.http_shards import web_shards
from tests.support.small_shards import make_png, make_shards

COMMANDS: dict[str, tuple[str | int, ...]] = {
    "check": ("check",),
    "filter": ("filter", "--min-side", 1),
    "dedup": ("dedup",),
    "stats": ("stats", "--samples", 0),
    "stats of a random subset": ("stats", "--samples", 20),
}


def files_in(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def num_dropped(path: Path) -> int:
    return read_drop_list(str(path)).total_samples


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("missing", ["shard-000001.tar", "shard-000001.tar.index"])
def test_missing_shard_is_reported_and_read_later(
    command: str, missing: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, *options = COMMANDS[command]
    work_dir, drop_list = tmp_path / "work", tmp_path / "drop.json"
    writes_drop_list = name in ("check", "filter", "dedup")
    with web_shards(tmp_path) as shards:
        arguments = [name, shards.web.url(), *options, "--work-dir", work_dir, "--workers", 0]
        if writes_drop_list:
            arguments += ["--drop-list", drop_list]

        (tmp_path / "data" / missing).rename(tmp_path / "moved")
        assert run_data_command(*arguments) == 1
        out = capsys.readouterr().out
        assert "unavailable" in out and "shard-000001.tar: " in out and "1 shard unavailable" in out
        assert len(files_in(work_dir)) == 2
        if writes_drop_list:
            assert num_dropped(drop_list) == 0

        (tmp_path / "moved").rename(tmp_path / "data" / missing)
        shards.web.requests.clear()
        assert run_data_command(*arguments) == 0
        assert "unavailable" not in capsys.readouterr().out
        # Only the missing shard is read.
        names = {path.rpartition("/")[2] for _, path, _ in shards.web.requests if ".tar" in path}
        assert names == {"shard-000001.tar", "shard-000001.tar.index"}


def test_store_that_refuses_every_request(tmp_path: Path) -> None:
    work_dir, drop_list = tmp_path / "work", tmp_path / "drop.json"
    with web_shards(tmp_path) as shards:
        url = shards.web.url()
        shards.web.query = "required=query"
        result = filter_samples([shards.manifest], FilterConfig(min_side=1), work_dir=str(work_dir))
        assert (result.samples, result.reasons.total(), result.dropped) == (0, 0, [{}])
        assert len(result.unavailable) == 3

        # The same work as a part of a job array.
        shards.web.query = ""
        arguments = ["filter", url, "--min-side", 1, "--work-dir", work_dir]
        arguments += ["--drop-list", drop_list, "--workers", 0, "--part", "0/1"]
        assert run_data_command(*arguments) == 0
        assert num_dropped(drop_list) == 0


def test_corruption_in_a_store_is_dropped(tmp_path: Path) -> None:
    work_dir, drop_list = tmp_path / "work", tmp_path / "drop.json"
    with web_shards(tmp_path) as shards:
        shard = tmp_path / "data" / "shard-000001.tar"
        shard.write_bytes(shard.read_bytes()[:3000])
        index = tmp_path / "data" / "shard-000002.tar.index"
        index.write_bytes(index.read_bytes()[:-9] + b"123456789")
        arguments = ["check", shards.web.url(), "--drop-list", drop_list]
        arguments += ["--workers", 0, "--work-dir", work_dir]
        assert run_data_command(*arguments) == 1
        assert num_dropped(drop_list) >= 12
        assert len(files_in(work_dir)) == 3


def test_disk_error_is_not_corruption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drop_list = tmp_path / "d"
    make_shards(tmp_path / "s", count=14)

    def fails(fd: int, count: int, offset: int) -> bytes:
        raise OSError(116, "Stale file handle")

    arguments = ["check", tmp_path / "s", "--drop-list", drop_list]
    arguments += ["--work-dir", tmp_path / "w", "--workers", 0]
    with monkeypatch.context() as patch:
        patch.setattr(os, "pread", fails)
        assert run_data_command(*arguments) == 1
    assert num_dropped(drop_list) == 0
    assert run_data_command(*arguments) == 0


def test_stats_of_a_random_subset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A truncated shard is corrupt; an unresponsive store is not."""
    with web_shards(tmp_path) as shards:
        path = tmp_path / "data" / "shard-000001.tar"
        path.write_bytes(path.read_bytes()[:3000])
        stats = compute_stats([shards.manifest], samples=20)
        assert not stats.unavailable and stats.corrupt["truncated"] >= 4

        def fails(*args: object, **options: object) -> bytes:
            raise StorageError("the store does not respond", kind=ErrorKind.UNREACHABLE)

        monkeypatch.setattr(object_store, "read_range", fails)
        stats = compute_stats([shards.manifest], samples=20)
        assert [shard.reason for shard in stats.unavailable] == ["unreachable"] * 3


def test_caption_stream_requires_every_shard(tmp_path: Path) -> None:
    manifest = make_shards(tmp_path, count=14)
    (tmp_path / "shard-000001.tar").unlink()
    with pytest.raises(DataError, match=r"shard-000001.tar .*missing-shard"):
        list(iter_captions([manifest], ["txt"]))


def test_write_retries_missing_images(tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for i in range(20):
        (images / f"{i}.png").write_bytes(make_png(i))
    rows = "".join(f"{i}.png,c{i}\n" for i in range(20))
    (tmp_path / "t.csv").write_text(f"image,caption\n{rows}")
    plan = WritePlan(
        source=Table(files=(str(tmp_path / "t.csv"),), image_folder=str(images)),
        out=str(tmp_path / "out"),
        samples_per_shard=10,
        max_skipped_ratio=0.5,
    )

    for name in ("7.png", "12.png"):
        (images / name).rename(tmp_path / name)
    first = write_dataset(plan)
    assert (first.samples, first.reused) == (18, 0)
    second = write_dataset(plan)
    assert (second.samples, second.reused, second.skipped) == (18, 2, first.skipped)

    (tmp_path / "7.png").rename(images / "7.png")
    third = write_dataset(plan)
    assert (third.samples, third.reused) == (19, 1)
    [row] = (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()
    assert json.loads(row)["origin"] == "t.csv line 14"

    (tmp_path / "12.png").rename(images / "12.png")
    assert (write_dataset(plan).samples, write_dataset(plan).reused) == (20, 2)
