from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.common.errors import ConfigError, DataError
from data_pipeline.common.processes import map_in_processes
from data_pipeline.order.drop_list import apply_drop_list, read_drop_list
from data_pipeline.preparing.check import check
from data_pipeline.sample_keys import SampleKeys
from data_pipeline.shards.manifest import load_index, load_manifest
from data_pipeline.shards.writer import write_shards
from tests.support.corruption import flip_bit, sample_offset, shard_path
from tests.support.data_commands import run_data_command
from tests.support.small_shards import make_png, make_shards


def test_intact_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_shards(tmp_path)
    assert run_data_command("check", tmp_path, "--decode", "--workers", 0) == 0
    output = capsys.readouterr().out
    assert "40 samples of 6 shards: all match the manifest" in output
    assert "images and captions are readable" in output


def test_every_kind_of_corruption(tmp_path: Path) -> None:
    manifest = make_shards(tmp_path)
    paths = [shard_path(manifest, shard) for shard in range(5)]
    flip_bit(paths[0], sample_offset(manifest, 0, 3) + 600)
    flip_bit(paths[1], paths[1].stat().st_size - 5)  # after the last sample
    paths[2].write_bytes(paths[2].read_bytes()[: sample_offset(manifest, 2, 5) + 700])
    paths[3].unlink()
    flip_bit(Path(manifest.index_url(manifest.shards[4])), -10)

    report = check([manifest])
    findings = {(row.shard, row.sample, row.reason) for row in report.findings}
    missing, no_index = (
        {(shard, sample, reason) for sample in range(-1, 7)}
        for shard, reason in ((3, "missing-shard"), (4, "corrupt-index"))
    )
    assert findings == missing | no_index | {
        (0, 3, "crc-mismatch"),
        (0, -1, "sha256"),
        (1, -1, "sha256"),
        (2, 5, "truncated"),
        (2, 6, "truncated"),
        (2, -1, "length"),
    }
    assert (report.samples, report.shards) == (40, 6)
    assert next(row.key for row in report.findings if row.reason == "crc-mismatch") == "00003"

    # The missing shard 3 is unavailable, not corrupt.
    assert report.corrupt_samples(0) == {0: {3}, 2: {5, 6}, 4: set(range(7))}
    assert [(row.task.shard, row.reason) for row in report.unavailable] == [(3, "missing-shard")]


def test_any_flipped_bit_is_detected(tmp_path: Path) -> None:
    manifest = make_shards(tmp_path, count=4, samples_per_shard=4)
    path, index = shard_path(manifest, 0), load_index(manifest, manifest.shards[0])
    for offset in np.random.default_rng(0).integers(0, path.stat().st_size, 40).tolist():
        flip_bit(path, offset)
        report = check([manifest])
        samples = {
            n for n in range(4) if index.offsets[n] <= offset < index.offsets[n] + index.extents[n]
        }
        assert report.corrupt_samples(0) == ({0: samples} if samples else {})
        assert [row.reason for row in report.findings if row.sample < 0] == ["sha256"]
        flip_bit(path, offset)
    assert not check([manifest]).findings


def test_decode_finds_invalid_content(tmp_path: Path) -> None:
    samples: list[dict[str, object]] = [
        {"__key__": "a", "png": make_png(1), "txt": "good"},
        {"__key__": "b", "png": make_png(2)[:-20], "txt": "x"},
        {"__key__": "c", "png": make_png(3), "txt": " "},
        {"__key__": "d", "txt": "x"},
        {"__key__": "e", "png": make_png(4), "txt": b"\xff"},
        {"__key__": "f", "png": make_png(5), "json": {"t": ["y"]}},
    ]
    manifest = write_shards(samples, tmp_path)
    assert [(row.key, row.reason) for row in check([manifest]).findings] == [("d", "no-image")]

    reasons = {row.key: row.reason for row in check([manifest], decode=True).findings}
    assert reasons == {
        "b": "corrupt-image",
        "c": "no-caption",
        "d": "no-image",
        "e": "invalid-text",
        "f": "no-caption",
    }
    other_key = check([manifest], decode=True, keys=SampleKeys(captions=("json:t",)))
    assert {row.key for row in other_key.findings} == {"a", "b", "c", "d", "e"}


def test_report_drop_list_and_exit_status(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifests = [
        make_shards(tmp_path / name, count=10, samples_per_shard=5, first=first)
        for name, first in (("a", 0), ("b", 100))
    ]
    flip_bit(shard_path(manifests[1], 1), sample_offset(manifests[1], 1, 2) + 700)
    command = ("check", f"{tmp_path}/{{a,b}}", "--workers", 0)
    files = ("--drop-list", tmp_path / "drop.json", "--json", tmp_path / "r.json")
    assert run_data_command(*command, *files) == 1

    output = capsys.readouterr().out
    assert "20 samples of 4 shards" in output
    assert "shard-000001.tar #2 00107: crc-mismatch: CRC-32" in output
    findings = json.loads((tmp_path / "r.json").read_text())["findings"]
    assert [(row["dataset"], row["reason"]) for row in findings] == [
        (1, "crc-mismatch"),
        (1, "sha256"),
    ]

    dropped = apply_drop_list(read_drop_list(str(tmp_path / "drop-1.json")), manifests[1])
    assert {shard: rows.tolist() for shard, rows in dropped.items()} == {1: [2]}
    assert read_drop_list(str(tmp_path / "drop-0.json")).total_samples == 0


def test_control_characters_are_escaped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_shards([{"__key__": "\x1b[31mred\u202e", "png": b"no", "txt": "x"}], tmp_path)
    assert run_data_command("check", tmp_path, "--decode", "--workers", 0) == 1
    output = capsys.readouterr().out
    assert "\x1b" not in output and "\u202e" not in output
    assert "\\x1b[31mred" in output


def test_parts_share_a_work_dir(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = make_shards(tmp_path / "shards")
    command = ("check", tmp_path / "shards", "--workers", 0)
    with pytest.raises(ConfigError, match="--part needs --work-dir"):
        run_data_command(*command, "--part", "0/2")

    flip_bit(shard_path(manifest, 1), 700)
    command = (*command, "--work-dir", tmp_path / "work")
    assert [run_data_command(*command, "--part", f"{part}/3") for part in range(3)] == [0, 0, 0]

    # Without the stored results, the deleted shard would be reported as missing.
    shard_path(manifest, 0).unlink()
    capsys.readouterr()
    assert run_data_command(*command) == 1
    output = capsys.readouterr().out
    assert "crc-mismatch" in output and "missing-shard" not in output

    # Other settings do not use the stored results.
    assert run_data_command(*command, "--decode") == 1
    assert "missing-shard" in capsys.readouterr().out


def test_result_does_not_depend_on_workers(tmp_path: Path) -> None:
    manifest = make_shards(tmp_path)
    flip_bit(shard_path(manifest, 4), 700)
    assert check([manifest], workers=2) == check([manifest])


def test_killed_worker_raises() -> None:
    with pytest.raises(DataError, match="worker process"):
        list(map_in_processes(os._exit, [9], workers=1))


@pytest.mark.parametrize(
    ("address", "samples"),
    [
        ("", 23),
        ("shard-000000.tar", 8),
        ("shard-*.tar", 23),
        ("shard-00000{0,1}.tar", 16),
        ("@list.txt", 16),
    ],
)
@pytest.mark.parametrize("command", ["check", "stats", "peek"])
def test_commands_take_shards_without_a_manifest(
    command: str, address: str, samples: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "data"
    make_shards(folder, count=23, samples_per_shard=8)
    for file in (*folder.glob("*.json"), *folder.glob("*.index")):
        file.unlink()
    names = "\n".join(str(folder / f"shard-00000{index}.tar") for index in (0, 1))
    (folder / "list.txt").write_text(names)
    prefix = "@" if address.startswith("@") else ""
    given = f"{prefix}{folder / address.removeprefix('@')}"
    options = [] if command == "peek" else ["--workers", 0]
    assert not run_data_command(command, given, *options)
    if command != "peek":
        assert f"{samples} " in capsys.readouterr().out
    assert sorted(path.suffix for path in folder.iterdir()) == [".tar"] * 3 + [".txt"]


def test_corrupt_shards_without_a_manifest_are_an_error(tmp_path: Path) -> None:
    manifest = make_shards(tmp_path, count=4, samples_per_shard=4)
    path = shard_path(manifest, 0)
    path.write_bytes(path.read_bytes()[:-2000])
    for file in (*tmp_path.glob("*.json"), *tmp_path.glob("*.index")):
        file.unlink()
    with pytest.raises(DataError, match=r"shard-000000\.tar"):
        run_data_command("check", tmp_path)


def test_a_folder_without_shards_has_no_manifest(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="manifest"):
        load_manifest(tmp_path)
