"""Reading samples in the dataset commands: which ones are problems, and which errors mean that the
shard is unavailable."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_pipeline.preparing import shard_access
from data_pipeline.preparing.shard_access import ShardUnavailableError, open_shard, read_samples
from data_pipeline.preparing.tasks import ShardTask, shard_tasks
from data_pipeline.samples import RawSample, SampleProblem
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.writer import write_shards
from tests.support.corruption import corrupt_caption, shard_path
from tests.support.data_commands import run_data_command
from tests.support.http_shards import WebShards, web_shards
from tests.support.results import problem_reasons
from tests.support.small_shards import make_shards

whole_and_selection = pytest.mark.parametrize(
    "samples", [None, (1, 5)], ids=["whole shard", "selection"]
)
"""A whole shard of a store is downloaded; of a selection, only byte ranges are."""


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return make_shards(tmp_path / "local", count=7)


@pytest.fixture
def shards(new_clients: None, tmp_path: Path) -> Iterator[WebShards]:
    """One shard in a store."""
    with web_shards(tmp_path, count=7) as running:
        yield running


def task_for(manifest: Manifest, samples: tuple[int, ...] | None = None) -> ShardTask:
    return shard_tasks([manifest])[0]._replace(samples=samples)


def read(task: ShardTask) -> list[RawSample | SampleProblem]:
    return [raw for _, raw in read_samples(task)]


@pytest.mark.parametrize(
    ("command", "report"),
    [
        (("stats", "--samples", 0, "--workers", 0), "crc-mismatch        1  14.3%"),
        (("filter", "--min-side", 1, "--workers", 0), "crc-mismatch        1  14.29%"),
        (("dedup", "--workers", 0), "7 samples, 1 of them unreadable"),
        (("peek", "--index", 3), "shard-000000.tar #3\n  crc-mismatch: CRC-32"),
    ],
    ids=["stats", "filter", "dedup", "peek"],
)
def test_commands_verify_checksums(
    command: tuple[str | int, ...],
    report: str,
    manifest: Manifest,
    capsys: pytest.CaptureFixture[str],
) -> None:
    corrupt_caption(shard_path(manifest, 0), 3)
    name, *options = command
    assert run_data_command(str(name), shard_path(manifest, 0).parent, *options) == 0
    assert report in capsys.readouterr().out


def test_too_large_samples_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = (100, 10_000, 100)
    samples: list[dict[str, object]] = [
        {"__key__": str(i), "bin": bytes(size)} for i, size in enumerate(sizes)
    ]
    monkeypatch.setattr(shard_access, "MAX_SAMPLE_BYTES", 5_000)
    results = read(task_for(write_shards(samples, tmp_path)))
    assert problem_reasons(results) == ["", "oversize", ""]


@pytest.mark.http
@whole_and_selection
def test_a_changed_object_is_corrupt(shards: WebShards, samples: tuple[int, ...] | None) -> None:
    """Its size differs from the manifest's; the store is reachable, so this will not change."""
    path = shards.web.folder / "shard-000000.tar"
    os.truncate(path, path.stat().st_size // 2)
    reasons = problem_reasons(read(task_for(shards.manifest, samples)))
    assert reasons[-1] == "truncated"
    assert set(reasons) <= {"", "truncated"}


@pytest.mark.http
@whole_and_selection
def test_missing_object(shards: WebShards, samples: tuple[int, ...] | None) -> None:
    (shards.web.folder / "shard-000000.tar").unlink()
    with pytest.raises(ShardUnavailableError, match=r"shard-000000\.tar") as error:
        read(task_for(shards.manifest, samples))
    assert error.value.slug == "missing-shard"


def test_missing_file(manifest: Manifest) -> None:
    shard_path(manifest, 0).unlink()
    with pytest.raises(ShardUnavailableError, match=r"shard-000000\.tar: No such file") as error:
        read(task_for(manifest))
    assert error.value.slug == "missing-shard"


def test_disk_error_while_reading(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = read_samples(task_for(manifest))
    next(samples)

    def fails(*_: object) -> bytes:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setattr(os, "pread", fails)
    with pytest.raises(ShardUnavailableError, match="Stale file handle") as error:
        next(samples)
    assert error.value.slug == "unreachable"


@pytest.mark.http
def test_files_are_closed(manifest: Manifest, shards: WebShards) -> None:
    for task in (task_for(manifest), task_for(shards.manifest)):
        with open_shard(task) as shard:
            fd = shard.fd
            os.fstat(fd)
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)
