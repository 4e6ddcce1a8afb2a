from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.common.errors import ConfigError, DataError
from data_pipeline.common.processes import in_processes
from data_pipeline.order.drop import apply_drop_list, read_drop_list
from data_pipeline.preparing.check import check
from data_pipeline.shards.manifest import Manifest, load_index, load_manifest
from data_pipeline.shards.writer import write_shards
from tests.support.data_commands import data
from tests.support.small_shards import make_shards, picture


def shard_path(manifest: Manifest, number: int) -> Path:
    return Path(manifest.shard_url(manifest.shards[number]))


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_good_shards_are_good(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_shards(tmp_path)
    assert data("check", tmp_path, "--decode", "--workers", 0) == 0
    assert (
        "40 samples of 6 shards: all as the manifest says, pictures and captions readable"
        in capsys.readouterr().out
    )


def test_every_kind_of_damage_is_found_and_named(tmp_path: Path) -> None:
    manifest = make_shards(tmp_path)
    indices = [load_index(manifest, entry) for entry in manifest.shards]
    offsets = [index.offsets for index in indices]
    flip(shard_path(manifest, 0), int(offsets[0][3]) + 600)  # in sample 3
    flip(
        shard_path(manifest, 1), shard_path(manifest, 1).stat().st_size - 5
    )  # after the last sample
    cut = shard_path(manifest, 2)
    cut.write_bytes(cut.read_bytes()[: int(offsets[2][5]) + 700])  # in the middle of sample 5
    shard_path(manifest, 3).unlink()
    flip(Path(manifest.index_url(manifest.shards[4])), -10)
    done = check([manifest])
    found = {(row.shard, row.sample, row.reason) for row in done.findings}
    gone, unknown = (
        {(shard, number, reason) for number in range(-1, 7)}
        for shard, reason in ((3, "missing-shard"), (4, "bad-index"))
    )
    assert found == gone | unknown | {
        (0, 3, "crc-mismatch"),
        (0, -1, "sha256"),
        (1, -1, "sha256"),
        (2, 5, "truncated"),
        (2, 6, "truncated"),
        (2, -1, "length"),
    }
    assert (done.samples, done.shards) == (40, 6)
    assert done.bad(0) == {
        0: {3},
        2: {5, 6},
        4: set(range(7)),
    }  # not 3, which may be there tomorrow
    assert [(row.task.shard, row.reason) for row in done.unread] == [(3, "missing-shard")]
    assert next(row.key for row in done.findings if row.reason == "crc-mismatch") == "00003"


def test_one_flipped_bit_anywhere_is_found(tmp_path: Path) -> None:
    manifest = make_shards(tmp_path, count=4, samples_per_shard=4)
    path, index = shard_path(manifest, 0), load_index(manifest, manifest.shards[0])
    for at in np.random.default_rng(0).integers(0, path.stat().st_size, 40).tolist():
        flip(path, at)
        done = check([manifest])
        samples = {
            n for n in range(4) if index.offsets[n] <= at < index.offsets[n] + index.extents[n]
        }
        assert done.bad(0) == ({0: samples} if samples else {})
        assert [row.reason for row in done.findings if row.sample < 0] == ["sha256"]
        flip(path, at)
    assert not check([manifest]).findings


def test_decoding_finds_what_no_checksum_can(tmp_path: Path) -> None:
    samples: list[dict[str, object]] = [
        {"__key__": "a", "png": picture(1), "txt": "good"},
        {"__key__": "b", "png": picture(2)[:-20], "txt": "x"},
        {"__key__": "c", "png": picture(3), "txt": " "},
        {"__key__": "d", "txt": "x"},
        {"__key__": "e", "png": picture(4), "txt": b"\xff"},
        {"__key__": "f", "png": picture(5), "json": {"t": ["y"]}},
    ]
    manifest = write_shards(samples, tmp_path)
    assert not check([manifest]).findings
    reasons = {row.key: row.reason for row in check([manifest], contents=True).findings}
    assert reasons == {
        "b": "bad-image",
        "c": "no-caption",
        "d": "no-image",
        "e": "bad-text",
        "f": "no-caption",
    }
    other = check([manifest], contents=True, caption_keys=["json:t"])
    assert {row.key for row in other.findings} == {"a", "b", "c", "d", "e"}


def test_the_report_the_drop_list_and_the_exit_status(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifests = [
        make_shards(tmp_path / name, count=10, samples_per_shard=5, first=first)
        for name, first in (("a", 0), ("b", 100))
    ]
    flip(
        shard_path(manifests[1], 1),
        int(load_index(manifests[1], manifests[1].shards[1]).offsets[2]) + 700,
    )
    drop = tmp_path / "drop.json"
    line = (
        "check",
        f"{tmp_path}/{{a,b}}",
        "--drop-list",
        drop,
        "--json",
        tmp_path / "r.json",
        "--workers",
        0,
    )
    assert data(*line) == 1
    said = capsys.readouterr().out
    assert "20 samples of 4 shards" in said
    assert "shard-000001.tar #2 00107: crc-mismatch: CRC-32" in said
    assert [
        (row["dataset"], row["reason"])
        for row in json.loads((tmp_path / "r.json").read_text())["findings"]
    ] == [(1, "crc-mismatch"), (1, "sha256")]
    dropped = apply_drop_list(read_drop_list(str(tmp_path / "drop-1.json")), manifests[1])
    assert {shard: rows.tolist() for shard, rows in dropped.items()} == {1: [2]}
    assert read_drop_list(str(tmp_path / "drop-0.json")).total_samples == 0


def test_terminal_control_of_strangers_is_spelt_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_shards([{"__key__": "\x1b[31mred\u202e", "png": b"no", "txt": "x"}], tmp_path)
    assert data("check", tmp_path, "--decode", "--workers", 0) == 1
    said = capsys.readouterr().out
    assert "\x1b" not in said and "\u202e" not in said
    assert "\\x1b[31mred" in said


def test_parts_meet_in_the_work_folder_and_changed_shards_are_read_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = make_shards(tmp_path / "shards")
    line = ("check", tmp_path / "shards", "--workers", 0)
    with pytest.raises(ConfigError, match="--part needs --work FOLDER"):
        data(*line, "--part", "0/2")
    flip(shard_path(manifest, 1), 700)
    line = (*line, "--work", tmp_path / "work")
    assert [data(*line, "--part", f"{part}/3") for part in range(3)] == [0, 0, 0]
    shard_path(
        manifest, 0
    ).unlink()  # so that a result that is not taken from the folder would show
    capsys.readouterr()
    assert data(*line) == 1
    said = capsys.readouterr().out
    assert "crc-mismatch" in said and "missing-shard" not in said
    assert data(*line, "--decode") == 1  # another question, other results
    assert "missing-shard" in capsys.readouterr().out


def test_several_processes_say_what_one_says(tmp_path: Path) -> None:
    manifest = make_shards(tmp_path)
    flip(shard_path(manifest, 4), 700)
    assert check([manifest], workers=2) == check([manifest])


def test_a_worker_that_dies_is_an_error_and_not_a_hang() -> None:
    with pytest.raises(DataError, match="a worker process was killed"):
        list(in_processes(os._exit, [9], workers=1))


def test_shards_without_a_manifest_are_refused(tmp_path: Path) -> None:
    make_shards(tmp_path)
    with pytest.raises(DataError, match="is a shard; give the folder of its manifest"):
        data("check", tmp_path / "shard-000000.tar")
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(DataError, match="no manifest of shards"):
        load_manifest(tmp_path)
