"""Indexing and writing shards in a real store, by the real command, and what is left when it is
ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import obstore
import pytest

from data_pipeline.common import storage
from data_pipeline.common.errors import DataError
from data_pipeline.shards.indexing import index_shards
from data_pipeline.shards.manifest import Manifest, load_index, load_manifest
from data_pipeline.shards.patterns import expand
from data_pipeline.shards.scan import index_shard
from data_pipeline.shards.shard_index import ShardIndex
from data_pipeline.shards.writer import write_shards
from tests.support.s3_server import S3Server
from tests.support.small_shards import make_shards, samples

pytestmark = [pytest.mark.e2e, pytest.mark.s3]
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def store(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    for name, value in s3_server.env.items():
        monkeypatch.setenv(name, value)
    yield s3_server


def bare_shards(folder: Path, count: int = 42) -> Manifest:
    manifest = make_shards(folder, count=count)
    for file in [*folder.glob("*.json"), *folder.glob("*.index")]:
        file.unlink()
    return manifest


def same_index(manifest: Manifest, local: Path, cache_dir: str = "") -> bool:
    """Whether every index says of its shard what indexing the local file says."""
    for entry in manifest.shards:
        found, true = (
            load_index(manifest, entry, cache_dir=cache_dir),
            index_shard(local / Path(entry.name).name),
        )
        if (
            found.keys != true.keys
            or found.crc32.tolist() != true.crc32.tolist()
            or found.sha256 != true.sha256
        ):
            return False
        if [found.members(i) for i in range(len(found))] != [
            true.members(i) for i in range(len(true))
        ]:
            return False
    return True


def test_shards_in_a_store(store: S3Server, tmp_path: Path) -> None:
    written = bare_shards(tmp_path / "data")
    url = store.upload(tmp_path / "data", "index-a")
    first = index_shards(url)
    assert load_manifest(url) == first
    assert [(row.name, row.samples, row.sha256) for row in first.shards] == [
        (row.name, row.samples, row.sha256) for row in written.shards
    ]
    assert all(row.etag for row in first.shards) and first.fingerprint() == written.fingerprint()
    assert same_index(first, tmp_path / "data") and same_index(
        first, tmp_path / "data", str(tmp_path / "cache")
    )
    assert len(list((tmp_path / "cache" / "index").iterdir())) == len(first.shards)
    for given in (
        f"{url}/shard-{{000000..000005}}.tar",
        f"{url}/shard-*.tar",
        store.url("index-a*/**"),
    ):
        assert index_shards(given, url) == first


def test_what_lies_elsewhere_and_which_are_meant(store: S3Server, tmp_path: Path) -> None:
    bare_shards(tmp_path / "data" / "b" / "c", count=14)
    url = store.upload(tmp_path / "data", "index-b")
    (tmp_path / "list.txt").write_text("shard-000001.tar\nshard-000000.tar # both\n")
    storage.write_bytes(f"{url}/b/c/list.txt", (tmp_path / "list.txt").read_bytes())
    both = [f"{url}/b/c/shard-00000{number}.tar" for number in range(2)]
    assert expand([f"@{url}/b/c/list.txt"]) == both[::-1]
    for pattern in ("**", "b/*/*.tar", "**/shard-?????[0-1].tar", "b/c"):
        assert expand([f"{url}/{pattern}"]) == both
    index_shards(both, str(tmp_path / "out"))
    manifest = load_manifest(tmp_path / "out")
    assert manifest.base == f"{url}/b/c" and manifest.url == str(tmp_path / "out")
    assert same_index(manifest, tmp_path / "data" / "b" / "c")
    assert not [name for name in storage.list_tree(url) if name.endswith((".index", ".json"))]


def test_only_changed_shards_are_read_again(
    store: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from data_pipeline.shards import index_one as one_shard

    scans: list[str] = []
    real = one_shard.scan
    monkeypatch.setattr(
        one_shard, "scan", lambda *a, **more: scans.append(a[2]) or real(*a, **more)
    )
    bare_shards(tmp_path / "data")
    url = store.upload(tmp_path / "data", "index-c")
    index_shards(url, workers=1, part=(1, 2))
    assert len(scans) == 3
    first = index_shards(url, workers=1)
    assert len(scans) == 6
    assert index_shards(url, workers=1) == first and len(scans) == 6
    make_shards(tmp_path / "other", count=7, first=900)  # another shard of the same length
    other = (tmp_path / "other" / "shard-000000.tar").read_bytes()
    assert len(other) == first.shards[2].bytes
    storage.write_bytes(f"{url}/shard-000002.tar", other)
    second = index_shards(url, workers=1)
    assert scans[6:] == [f"{url}/shard-000002.tar"]
    assert (
        second.shards[2].sha256 != first.shards[2].sha256 and second.shards[:2] == first.shards[:2]
    )


def test_damage_in_a_store_is_named(store: S3Server, tmp_path: Path) -> None:
    bare_shards(tmp_path / "data", count=28)
    url = store.upload(tmp_path / "data", "index-d")
    data = (tmp_path / "data" / "shard-000001.tar").read_bytes()
    storage.write_bytes(f"{url}/shard-000001.tar", data[:5000])
    with pytest.raises(
        DataError,
        match=rf"2 of 5 shards(.|\n)*{url}/shard-000001.tar: .* cut off(.|\n)*missing.tar",
    ):
        index_shards([url, f"{url}/missing.tar"])
    manifest = index_shards(url, salvage=True)
    assert [row.samples for row in manifest.shards] == [7, 2, 7, 7]


def test_written_into_a_store(store: S3Server, tmp_path: Path) -> None:
    url = store.url("written")
    there = write_shards(samples(20), url, samples_per_shard=8)
    here = write_shards(samples(20), tmp_path, samples_per_shard=8)
    assert there.shards == here.shards and load_manifest(url) == there
    for name in (*(row.name for row in here.shards), *(row.index for row in here.shards)):
        assert storage.read_bytes(f"{url}/{name}") == (tmp_path / name).read_bytes()
    with pytest.raises(DataError, match="cannot write sample"):
        write_shards([*samples(2), {"__key__": "bad", "png": object()}], url)
    with pytest.raises(DataError, match="still being written, or that was broken off"):
        load_manifest(url)


def big_shards(folder: Path, shards: int, each: int) -> None:
    """Shards that take a moment to index."""
    from webdataset import TarWriter

    folder.mkdir()
    body = os.urandom(30_000)
    for shard in range(shards):
        with TarWriter(str(folder / f"{shard:05d}.tar"), mtime=0) as tar:
            for number in range(each):
                tar.write(
                    {
                        "__key__": f"{shard:03d}{number:05d}",
                        "jpg": body,
                        "txt": f"{number}".encode(),
                    }
                )


def test_the_command_goes_on_after_a_kill(store: S3Server, tmp_path: Path) -> None:
    """Killed without warning in the middle, with its workers; the next call reads only what is
    missing."""
    big_shards(tmp_path / "data", shards=24, each=100)
    url = store.upload(tmp_path / "data", "index-kill")
    command = [sys.executable, "-m", "data_pipeline", "index", url, "--workers", "2"]
    process = subprocess.Popen(
        command, cwd=ROOT, env=os.environ, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 60
    while not (done := indices(url)) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    killed = process.returncode == -signal.SIGKILL
    done = indices(url)
    assert done and (len(done) < 24 or not killed)
    for name in done:  # none is half there
        ShardIndex.from_bytes(storage.read_bytes(f"{url}/{name}"), name)
    with pytest.raises(DataError):
        load_manifest(url)
    times = {name: modified(store, f"index-kill/{name}") for name in done}
    again = subprocess.run(
        command, cwd=ROOT, env=os.environ, capture_output=True, text=True, check=True
    )
    assert f"{len(done)} of 24 shards had an index that fits" in again.stderr
    assert "manifest.json: 24 shards, 2,400 samples" in again.stdout
    assert times == {name: modified(store, f"index-kill/{name}") for name in done}
    manifest = load_manifest(url)
    for entry in manifest.shards[::6]:
        index, data = load_index(manifest, entry), (tmp_path / "data" / entry.name).read_bytes()
        for i in range(0, len(index), 9):
            offset, extent = int(index.offsets[i]), int(index.extents[i])
            assert zlib.crc32(data[offset : offset + extent]) == index.crc32[i]


def indices(url: str) -> list[str]:
    return [name for name in storage.list_names(url) if name.endswith(".index")]


def modified(store: S3Server, name: str) -> object:
    return obstore.head(store.store(), name)["last_modified"]


def test_memory_stays_bounded(store: S3Server, tmp_path: Path) -> None:
    """A shard of 300 MB is indexed by a process that never holds more than some pieces of it."""
    from webdataset import TarWriter

    (tmp_path / "data").mkdir()
    body = os.urandom(1 << 20)
    with TarWriter(str(tmp_path / "data" / "big.tar"), mtime=0) as tar:
        for number in range(300):
            tar.write({"__key__": f"{number:05d}", "jpg": body})
    url = store.upload(tmp_path / "data", "index-big")
    program = (
        "import json, resource, sys\n"
        "from data_pipeline.shards.indexing import index_shards\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "found = index_shards(sys.argv[1], sys.argv[2], workers=1)\n"
        "after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "print(json.dumps([found.total_samples, (after - before) // 1024]))\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program, url, str(tmp_path / "out")],
        cwd=ROOT,
        env=os.environ,
        capture_output=True,
        text=True,
        check=True,
    )
    count, grown_mib = json.loads(ended.stdout.splitlines()[-1])
    assert count == 300
    assert grown_mib < 150
