"""Training on missing, truncated and corrupt shards.

Corrupt samples are no error: they are skipped, counted, and listed in corrupt_samples.jsonl.
"""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import pytest

from pretrain.train.jsonl import read_rows
from tests.support.bad_input import SMALL_MODEL, Workspace, assert_contains
from tests.support.corruption import flip_bit
from tests.support.launch import torchrun
from tests.support.shape_dataset import CAPTIONS, render_shape_png

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]


def test_missing_manifest(workspace: Workspace) -> None:
    (workspace.shards / "manifest.json").unlink()
    assert_contains(
        workspace.train_error(f"data.train=['{workspace.shards}/manifest.json']"),
        f"cannot read {workspace.shards}/manifest.json",
        f"`vlmoe data index {workspace.shards}`",
    )

    result = workspace.train().check()
    assert f"{workspace.shards} has no manifest" in result.output


def test_too_many_missing_shards(workspace: Workspace) -> None:
    workspace.shard_path(1).unlink()
    workspace.shard_path(2).unlink()
    assert_contains(
        workspace.train_error(),
        f"{workspace.shard_path(1)} is missing",
        "16 samples",
        "copy it again",
        "2 of 4 shards",
        "32 of 64 samples",
        "data.max_corrupt_ratio 0.01",
    )
    assert not (workspace.run_dir / "checkpoints").exists()


def test_tolerated_missing_shard(workspace: Workspace) -> None:
    workspace.shard_path(1).unlink()
    result = workspace.train("data.max_corrupt_ratio=0.5", "schedule.total_steps=16").check()
    assert_contains(result.output, "1 of 4 shards are missing", "16 of 64 samples")

    rows = corrupt_samples(workspace)
    assert {(row["shard"], row["reason"]) for row in rows} == {
        ("shard-000001.tar", "missing-shard")
    }
    metrics = read_rows(workspace.run_dir / "metrics.jsonl")[-1]
    assert metrics["data/samples_seen"] == 128 - len(rows)


def test_truncated_shard(workspace: Workspace) -> None:
    """Only the samples after the end of the file are lost."""
    shard = workspace.shard_path(1)
    size = shard.stat().st_size
    os.truncate(shard, size // 2)
    result = workspace.train("data.max_corrupt_ratio=0.5", "schedule.total_steps=8").check()
    assert_contains(result.output, f"{shard} has {size // 2} bytes", f"manifest expects {size}")

    rows = corrupt_samples(workspace)
    assert {(row["shard"], row["reason"]) for row in rows} == {("shard-000001.tar", "truncated")}
    assert 4 <= len(rows) <= 12


def test_flipped_bit(workspace: Workspace) -> None:
    flip_bit(workspace.shard_path(2), 3000)
    workspace.train("schedule.total_steps=8").check()
    (row,) = corrupt_samples(workspace)
    assert (row["shard"], row["reason"]) == ("shard-000002.tar", "crc-mismatch")
    assert_contains(str(row["detail"]), "CRC-32", "index expects")


def test_corrupt_sample_on_one_of_two_ranks(workspace: Workspace) -> None:
    flip_bit(workspace.shard_path(2), 3000)
    settings = ["parallel.expert_parallel_size=2", "schedule.total_steps=8"]
    arguments = ["-m", "pretrain", *workspace.train_arguments(*SMALL_MODEL, *settings)]
    torchrun(arguments, processes=2, timeout_seconds=60).check()
    assert [row["reason"] for row in corrupt_samples(workspace)] == ["crc-mismatch"]


def test_corrupt_samples_are_listed_and_counted(workspace: Workspace) -> None:
    (workspace.shards / "manifest.json").unlink()
    for path in workspace.shards.glob("shard-*"):
        path.unlink()
    reasons = write_mixed_shard(workspace.shards / "mixed.tar")
    workspace.vlmoe(["data", "index", str(workspace.shards)]).check()

    result = workspace.train().check()
    rows = corrupt_samples(workspace)
    assert {row["key"]: row["reason"] for row in rows} == reasons
    assert {row["shard"] for row in rows} == {"mixed.tar"}
    details = {str(row["key"]): str(row["detail"]) for row in rows}
    assert_contains(details["03"], "txt", "png")
    assert_contains(details["05"], "b'this is a te'", "JPEG, PNG")

    metrics = read_rows(workspace.run_dir / "metrics.jsonl")[-1]
    assert metrics["data/corrupt/no-caption"] == 2 and metrics["data/corrupt/corrupt-image"] == 2
    assert metrics["data/samples_seen"] == 32 - len(reasons)
    assert_contains(result.output, "mixed.tar, sample", "corrupt_samples.jsonl")


def corrupt_samples(workspace: Workspace) -> list[dict[str, object]]:
    return read_rows(workspace.run_dir / "corrupt_samples.jsonl")


def write_mixed_shard(path: Path) -> dict[str, str]:
    """Write 32 samples; returns the expected reason of each corrupt one."""
    with tarfile.open(path, "w") as archive:
        for index in range(32):
            key, caption = f"{index:02d}", CAPTIONS[index]
            image = render_shape_png(caption, 24)
            files = {"png": image, "txt": caption.encode()}
            match key:
                case "03":
                    del files["txt"]
                case "05":
                    files = {"jpg": b"this is a text file\n", "txt": caption.encode()}
                case "07":
                    del files["png"]
                case "09":
                    files["txt"] = b" \n"
                case "11":
                    files["png"] = image[: len(image) // 2]
            for extension, data in files.items():
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return {
        "03": "no-caption",
        "05": "corrupt-image",
        "07": "no-image",
        "09": "no-caption",
        "11": "corrupt-image",
    }
