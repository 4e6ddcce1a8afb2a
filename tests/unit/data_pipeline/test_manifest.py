"""Manifests: contents, location of the shards, and errors."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path

import pytest

from data_pipeline.common.errors import DataError
from data_pipeline.shards.manifest import (
    MANIFEST_NAME,
    VERSION,
    Manifest,
    ShardEntry,
    load_index,
    load_manifest,
    parse_manifest,
    write_manifest,
)
from data_pipeline.shards.shard_paths import resolve_base
from data_pipeline.shards.writer import write_shard, write_shards
from tests.support.small_shards import make_samples, make_shards


def entry(name: str = "x.tar", **changes: object) -> ShardEntry:
    given = {
        "samples": 1,
        "bytes": 1,
        "sha256": "a" * 64,
        "index": f"{name}.index",
        "index_sha256": "b" * 64,
    }
    return ShardEntry(**{"name": name, **given, **changes})  # type: ignore[arg-type]


def test_written_folder_is_read_back(tmp_path: Path) -> None:
    written = write_shards(
        make_samples(20), tmp_path, samples_per_shard=8, metadata={"license": "CC0"}
    )
    manifest = load_manifest(tmp_path)
    assert manifest == written == load_manifest(f"file://{tmp_path}/{MANIFEST_NAME}")
    assert [shard.samples for shard in manifest.shards] == [8, 8, 4]
    assert manifest.total_samples == 20
    assert manifest.metadata == {"license": "CC0"}
    for shard in manifest.shards:
        data = (tmp_path / shard.name).read_bytes()
        assert (shard.bytes, shard.sha256) == (len(data), hashlib.sha256(data).hexdigest())
        assert (
            hashlib.sha256((tmp_path / shard.index).read_bytes()).hexdigest() == shard.index_sha256
        )


def test_empty_shard(tmp_path: Path) -> None:
    rows = [
        write_shard(make_samples(3), str(tmp_path), "a.tar"),
        write_shard([], str(tmp_path), "b.tar"),
    ]
    manifest = write_manifest(tmp_path, rows)
    assert load_manifest(tmp_path) == manifest
    assert [shard.samples for shard in manifest.shards] == [3, 0]
    assert len(load_index(manifest, rows[1])) == 0
    with pytest.raises(DataError, match="there is no sample in its 1 shard "):
        write_manifest(tmp_path, rows[1:])


def test_optional_fields_of_rows(tmp_path: Path) -> None:
    rows = [entry("a.tar"), entry("b.tar", etag='"e-2"', corruption="3 samples lost")]
    assert write_manifest(tmp_path, rows).shards == load_manifest(tmp_path).shards == tuple(rows)
    plain, extended = json.loads((tmp_path / MANIFEST_NAME).read_text())["shards"]
    assert set(extended) - set(plain) == {"etag", "corruption"}


def test_fingerprint_depends_on_contents_and_order(tmp_path: Path) -> None:
    rows = (entry("a.tar"), entry("b.tar"))
    fingerprints = [
        Manifest(url=url, base=base, shards=shards, metadata=metadata).fingerprint()
        for url, base, shards, metadata in (
            ("/a", "", rows, {}),
            ("/b", "s3://c", rows, {"license": "x"}),
            ("/a", "", (entry("a.tar"), entry("b.tar", index_sha256="c" * 64, etag="e")), {}),
            ("/a", "", rows[::-1], {}),
            ("/a", "", (entry("a.tar"), entry("b.tar", sha256="c" * 64)), {}),
            ("/a", "", (entry("a.tar"), entry("b.tar", samples=2)), {}),
            ("/a", "", (entry("a.tar"), entry("c.tar")), {}),
        )
    ]
    assert len(fingerprints[0]) == 64
    assert (
        fingerprints[0] == fingerprints[1] == fingerprints[2]
    )  # independent of locations and indices
    assert len(set(fingerprints)) == 5


@pytest.mark.parametrize(
    ("folder", "base", "expected"),
    [
        ("/m", "", "/m"),
        ("/m", ".", "/m"),
        ("/m/n", "../shards", "/m/shards"),
        ("/m", "/s", "/s"),
        ("m", "sub/folder", "m/sub/folder"),
        ("/m", "s3://b/x/", "s3://b/x"),
        ("s3://b/m/n", "../s", "s3://b/m/s"),
        ("s3://b/m", "s", "s3://b/m/s"),
        ("s3://b/m", "gs://c/s", "gs://c/s"),
        ("/m", "file:/s", "/s"),
    ],
)
def test_resolve_base(folder: str, base: str, expected: str) -> None:
    assert resolve_base(base, folder) == expected


@pytest.mark.parametrize(
    ("folder", "base"),
    [
        ("s3://b/m", "/etc"),
        ("s3://b/m", "file:/etc"),
        ("s3://b/m", "../../c"),
        ("/m", 7),
        ("/m", "a\0b"),
        ("/m", "pipe:ls"),
        ("/m", "ftp://x/y"),
    ],
)
def test_invalid_base(folder: str, base: object) -> None:
    content = {"version": VERSION, "base": base, "total_samples": 1, "shards": [entry().__dict__]}
    with pytest.raises(DataError):
        parse_manifest(json.dumps(content).encode(), folder, "x")


def test_manifest_in_another_folder(tmp_path: Path) -> None:
    written = make_shards(tmp_path / "shards")
    for shard in written.shards:
        (tmp_path / "shards" / shard.index).rename(tmp_path / shard.index)
    (tmp_path / "shards" / MANIFEST_NAME).unlink()
    write_manifest(tmp_path, written.shards, base="shards")
    manifest = load_manifest(tmp_path)
    assert manifest.base == f"{tmp_path}/shards"
    assert manifest.shard_url(manifest.shards[0]) == f"{tmp_path}/shards/shard-000000.tar"
    assert manifest.index_url(manifest.shards[0]) == f"{tmp_path}/shard-000000.tar.index"
    assert load_index(manifest, manifest.shards[0]).key(0) == "00000"
    assert manifest.fingerprint() == written.fingerprint()


def test_missing_manifest_error_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"no manifest of shards.*`vlmoe data index {tmp_path}`"):
        load_manifest(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 1}, "version 1"),
        ({"version": None}, "version None"),
        ({"total_samples": 7}, "total_samples 7"),
        ({"shards": 3}, "not a manifest"),
        ({"shards": [[]]}, "not a manifest"),
        ({"shards": [{"path": "x"}]}, "not a manifest"),
        ({"shards": [], "total_samples": 0}, "0 shards"),
        ({"shards": [entry().__dict__] * 2, "total_samples": 2}, "'x.tar' twice"),
    ],
)
def test_inconsistent_manifest(tmp_path: Path, change: dict[str, object], message: str) -> None:
    make_shards(tmp_path)
    path = tmp_path / MANIFEST_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DataError, match=message):
        load_manifest(tmp_path)


def test_manifest_of_an_older_version(tmp_path: Path) -> None:
    row = {"name": "x.tar", "samples": 1, "bytes": 1, "sha256": "a" * 64, "index": "x.json"}
    (tmp_path / MANIFEST_NAME).write_text(
        json.dumps({"version": 1, "shards": [row], "total_samples": 1})
    )
    with pytest.raises(
        DataError, match=r"manifest.json has version 1, .*version 3 .*`vlmoe data index"
    ):
        load_manifest(tmp_path)


@pytest.mark.parametrize(
    "name", ["../x.tar", "/etc/x.tar", "a/../../x.tar", "s3://b/x.tar", "", "a\0.tar", 7]
)
def test_shard_names_outside_of_the_folder_are_rejected(name: str) -> None:
    with pytest.raises(DataError, match="is not a path in the manifest"):
        entry(name, index="x")
    with pytest.raises(DataError, match="is not a path in the manifest"):
        entry(index=name)


@pytest.mark.parametrize(
    "change",
    [
        {"sha256": "../" * 5},
        {"index_sha256": "A" * 64},
        {"samples": 1.5},
        {"samples": -1},
        {"samples": True},
        {"bytes": 0},
        {"etag": 3},
        {"corruption": []},
        {"sha256": None},
    ],
)
def test_invalid_row_is_rejected(tmp_path: Path, change: dict[str, object]) -> None:
    make_shards(tmp_path)
    path = tmp_path / MANIFEST_NAME
    content = json.loads(path.read_text())
    content["shards"][1] |= change
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"manifest.json: shard 'shard-000001.tar' has"):
        load_manifest(tmp_path)


def test_changed_index_is_rejected(tmp_path: Path) -> None:
    manifest = make_shards(tmp_path)
    path = tmp_path / manifest.shards[0].index
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(
        DataError, match=r"shard-000000.tar.index has SHA-256 \w+.*manifest"
    ) as error:
        load_index(manifest, manifest.shards[0])
    assert error.value.slug == "corrupt-index"
    path.unlink()
    with pytest.raises(DataError, match="No such file"):
        load_index(manifest, manifest.shards[0])


@pytest.mark.parametrize("change", [{"samples": 6}, {"bytes": 512}, {"sha256": "0" * 64}])
def test_index_of_another_shard_is_rejected(tmp_path: Path, change: dict[str, object]) -> None:
    manifest = make_shards(tmp_path)
    row = ShardEntry(**{**manifest.shards[0].__dict__, **change})  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"\b7 samples .*\b20480 bytes"):
        load_index(manifest, row)


def test_metadata_must_not_use_reserved_keys(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"\['base'\]"):
        write_manifest(tmp_path, [entry()], {"base": "/etc"})
    with pytest.raises(DataError, match="two shards have the name"):
        write_manifest(tmp_path, [entry(), entry()])
    with pytest.raises(DataError, match="there is no sample in its 0 shards"):
        write_manifest(tmp_path, [])


@pytest.mark.parametrize("rounds", [1500, pytest.param(30_000, marks=pytest.mark.long)])
def test_fuzzed_manifests(tmp_path: Path, rounds: int) -> None:
    write_manifest(
        tmp_path,
        [entry(f"{i}.tar", samples=i) for i in range(4)],
        {"license": "é"},
        base="s3://b/c",
    )
    valid, rng, rejected = (tmp_path / MANIFEST_NAME).read_bytes(), random.Random(rounds), 0
    values = [
        b"null",
        b"-1",
        b"1e999",
        b"NaN",
        b"[]",
        b"{}",
        b'"../../x"',
        b'"\\ud800"',
        b"[" * 5000,
        b"9" * 5000,
    ]
    for _ in range(rounds):
        data = bytearray(valid)
        start = rng.randrange(len(data))
        match rng.randrange(4):
            case 0:
                data[start] = rng.randrange(256)
            case 1:
                del data[start:]
            case 2:
                data[start : start + rng.randrange(8)] = rng.choice(values)
            case 3:
                colon = data.find(b": ", start)
                end = data.find(b",", colon)
                data[colon + 2 : end] = rng.choice(values)
        try:
            manifest = parse_manifest(bytes(data), "/m", "x")
        except DataError:
            rejected += 1
            continue
        assert manifest.total_samples == sum(shard.samples for shard in manifest.shards) > 0
        for shard in manifest.shards:
            assert not Path(shard.name).is_absolute() and ".." not in Path(shard.name).parts
        assert len(manifest.fingerprint()) == 64
    assert 0 < rejected < rounds
