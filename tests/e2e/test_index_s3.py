"""Indexing and writing shards in an S3 server, and `vlmoe data index` when it is killed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import obstore
import pytest

from data_pipeline.common import storage
from data_pipeline.common.errors import DataError
from data_pipeline.shards import index_job
from data_pipeline.shards.indexing import index_shards
from data_pipeline.shards.manifest import Manifest, load_index, load_manifest
from data_pipeline.shards.patterns import expand_patterns
from data_pipeline.shards.scan import index_shard
from data_pipeline.shards.shard_index import ShardIndex
from data_pipeline.shards.writer import write_shards
from tests.support.launch import ROOT
from tests.support.s3_server import S3Server
from tests.support.small_shards import make_samples, make_shards

pytestmark = [pytest.mark.e2e, pytest.mark.s3]


@pytest.fixture
def store(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    for name, value in s3_server.env.items():
        monkeypatch.setenv(name, value)
    return s3_server


def make_bare_shards(folder: Path, count: int = 42) -> Manifest:
    """Write shards without manifest and indices; returns the manifest."""
    manifest = make_shards(folder, count=count)
    for path in [*folder.glob("*.json"), *folder.glob("*.index")]:
        path.unlink()
    return manifest


def assert_indices_match(manifest: Manifest, local: Path, cache_dir: str = "") -> None:
    """Compare each index with one of the local file."""
    for entry in manifest.shards:
        actual = load_index(manifest, entry, cache_dir=cache_dir)
        expected = index_shard(local / Path(entry.name).name)
        assert actual.keys == expected.keys
        assert actual.crc32.tolist() == expected.crc32.tolist()
        assert actual.sha256 == expected.sha256
        members = [actual.members(i) for i in range(len(actual))]
        assert members == [expected.members(i) for i in range(len(expected))]


def index_files(url: str) -> list[str]:
    return [name for name in storage.list_names(url) if name.endswith(".index")]


def test_shards_in_a_store(store: S3Server, tmp_path: Path) -> None:
    written = make_bare_shards(tmp_path / "data")
    url = store.upload(tmp_path / "data", "index-a")
    manifest = index_shards(url)
    assert load_manifest(url) == manifest
    assert [(row.name, row.samples, row.sha256) for row in manifest.shards] == [
        (row.name, row.samples, row.sha256) for row in written.shards
    ]
    assert all(row.etag for row in manifest.shards)
    assert manifest.fingerprint() == written.fingerprint()

    assert_indices_match(manifest, tmp_path / "data")
    assert_indices_match(manifest, tmp_path / "data", str(tmp_path / "cache"))
    assert len(list((tmp_path / "cache" / "index").iterdir())) == len(manifest.shards)

    patterns = (
        f"{url}/shard-{{000000..000005}}.tar",
        f"{url}/shard-*.tar",
        store.url("index-a*/**"),
    )
    for pattern in patterns:
        assert index_shards(pattern, url) == manifest


def test_patterns_and_manifest_in_another_folder(store: S3Server, tmp_path: Path) -> None:
    make_bare_shards(tmp_path / "data" / "b" / "c", count=14)
    url = store.upload(tmp_path / "data", "index-b")
    shards = [f"{url}/b/c/shard-00000{i}.tar" for i in range(2)]
    listing = f"{url}/b/c/list.txt"
    storage.write_bytes(listing, b"shard-000001.tar\nshard-000000.tar # both\n")
    assert expand_patterns([f"@{listing}"]) == shards[::-1]
    for pattern in ("**", "b/*/*.tar", "**/shard-?????[0-1].tar", "b/c"):
        assert expand_patterns([f"{url}/{pattern}"]) == shards

    index_shards(shards, str(tmp_path / "out"))
    manifest = load_manifest(tmp_path / "out")
    assert manifest.base == f"{url}/b/c" and manifest.url == str(tmp_path / "out")
    assert_indices_match(manifest, tmp_path / "data" / "b" / "c")
    assert not [name for name in storage.list_tree(url) if name.endswith((".index", ".json"))]


def test_only_changed_shards_are_read_again(
    store: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scanned: list[str] = []
    scan = index_job.scan

    def recording_scan(chunks, total_bytes, where, **options):  # type: ignore[no-untyped-def]
        scanned.append(where)
        return scan(chunks, total_bytes, where, **options)

    monkeypatch.setattr(index_job, "scan", recording_scan)
    make_bare_shards(tmp_path / "data")
    url = store.upload(tmp_path / "data", "index-c")
    index_shards(url, workers=1, part=(1, 2))
    assert len(scanned) == 3
    first = index_shards(url, workers=1)
    assert len(scanned) == 6
    assert index_shards(url, workers=1) == first and len(scanned) == 6

    make_shards(tmp_path / "other", count=7, first=900)  # another shard of the same size
    other = (tmp_path / "other" / "shard-000000.tar").read_bytes()
    assert len(other) == first.shards[2].bytes
    storage.write_bytes(f"{url}/shard-000002.tar", other)
    second = index_shards(url, workers=1)
    assert scanned[6:] == [f"{url}/shard-000002.tar"]
    assert second.shards[2].sha256 != first.shards[2].sha256
    assert second.shards[:2] == first.shards[:2]


def test_truncated_and_missing_shards(store: S3Server, tmp_path: Path) -> None:
    make_bare_shards(tmp_path / "data", count=28)
    url = store.upload(tmp_path / "data", "index-d")
    data = (tmp_path / "data" / "shard-000001.tar").read_bytes()
    storage.write_bytes(f"{url}/shard-000001.tar", data[:5000])
    with pytest.raises(DataError) as error:
        index_shards([url, f"{url}/missing.tar"])
    header, *problems = str(error.value).splitlines()
    assert "2 of 5 shards" in header
    assert f"{url}/shard-000001.tar" in problems[0] and "truncated" in problems[0]
    assert "missing.tar" in problems[1]

    manifest = index_shards(url, salvage=True)
    assert [row.samples for row in manifest.shards] == [7, 2, 7, 7]


def test_writing_into_a_store(store: S3Server, tmp_path: Path) -> None:
    url = store.url("written")
    remote = write_shards(make_samples(20), url, samples_per_shard=8)
    local = write_shards(make_samples(20), tmp_path, samples_per_shard=8)
    assert remote.shards == local.shards and load_manifest(url) == remote
    for name in (*(row.name for row in local.shards), *(row.index for row in local.shards)):
        assert storage.read_bytes(f"{url}/{name}") == (tmp_path / name).read_bytes()

    invalid = {"__key__": "invalid", "png": object()}
    with pytest.raises(DataError, match="cannot write sample 'invalid'"):
        write_shards([*make_samples(2), invalid], url)
    with pytest.raises(DataError, match="still being written"):
        load_manifest(url)


def make_large_shards(folder: Path, num_shards: int, samples_per_shard: int) -> None:
    """Write shards that take a moment to index."""
    from webdataset import TarWriter

    folder.mkdir()
    image = os.urandom(30_000)
    for shard in range(num_shards):
        with TarWriter(str(folder / f"{shard:05d}.tar"), mtime=0) as tar:
            for i in range(samples_per_shard):
                key = f"{shard:03d}{i:05d}"
                tar.write({"__key__": key, "jpg": image, "txt": str(i).encode()})


def test_killed_command_resumes(store: S3Server, tmp_path: Path) -> None:
    """After SIGKILL of the command and its workers, a second call reads only the other shards."""
    make_large_shards(tmp_path / "data", num_shards=24, samples_per_shard=100)
    url = store.upload(tmp_path / "data", "index-kill")
    command = [sys.executable, "-m", "data_pipeline", "index", url, "--workers", "2"]
    killed, done = run_until_first_index(command, url)
    assert done and (len(done) < 24 or not killed)
    for name in done:  # none is incomplete
        ShardIndex.from_bytes(storage.read_bytes(f"{url}/{name}"), name)
    with pytest.raises(DataError):
        load_manifest(url)

    def modification_times() -> list[object]:
        paths = (f"index-kill/{name}" for name in done)
        return [obstore.head(store.store(), path)["last_modified"] for path in paths]

    times = modification_times()
    resumed = subprocess.run(
        command, cwd=ROOT, env=os.environ, capture_output=True, text=True, check=True
    )
    reused = re.search(r"(\d+) of 24 shards", resumed.stderr)
    # The server may have finished an upload after `done` was listed.
    assert reused and len(done) <= int(reused[1]) < 24
    assert "manifest.json: 24 shards, 2,400 samples" in resumed.stdout
    assert modification_times() == times

    manifest = load_manifest(url)
    for entry in manifest.shards[::6]:
        index, data = load_index(manifest, entry), (tmp_path / "data" / entry.name).read_bytes()
        for i in range(0, len(index), 9):
            offset, extent = int(index.offsets[i]), int(index.extents[i])
            assert zlib.crc32(data[offset : offset + extent]) == index.crc32[i]


def run_until_first_index(command: list[str], url: str) -> tuple[bool, list[str]]:
    """Start a command and kill it once an index exists at `url`.

    Returns:
        Whether it was killed before it ended, and the names of the indices.
    """
    process = subprocess.Popen(
        command, cwd=ROOT, env=os.environ, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 60
    while not index_files(url) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    return process.returncode == -signal.SIGKILL, index_files(url)


def test_memory_is_bounded(store: S3Server, tmp_path: Path) -> None:
    """Indexing a shard of 300 MB needs much less memory than its size."""
    from webdataset import TarWriter

    (tmp_path / "data").mkdir()
    image = os.urandom(1 << 20)
    with TarWriter(str(tmp_path / "data" / "large.tar"), mtime=0) as tar:
        for i in range(300):
            tar.write({"__key__": f"{i:05d}", "jpg": image})
    url = store.upload(tmp_path / "data", "index-large")
    program = (
        "import json, resource, sys\n"
        "from data_pipeline.shards.indexing import index_shards\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "manifest = index_shards(sys.argv[1], sys.argv[2], workers=1)\n"
        "after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "print(json.dumps([manifest.total_samples, (after - before) // 1024]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, url, str(tmp_path / "out")],
        cwd=ROOT,
        env=os.environ,
        capture_output=True,
        text=True,
        check=True,
    )
    total_samples, growth_mib = json.loads(done.stdout.splitlines()[-1])
    assert total_samples == 300
    assert growth_mib < 150
