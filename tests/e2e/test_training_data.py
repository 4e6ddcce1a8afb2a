"""Data of whole runs: mixtures, filters, missing manifests, the ledger, and a killed run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.shards.manifest import MANIFEST_NAME
from pretrain.train.jsonl import read_rows
from tests.support.launch import ROOT, LaunchResult, clean_environment, run_ranks
from tests.support.shape_dataset import ShapeDataset, make_shape_dataset

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]

SETTINGS = """
    model.width=32 model.num_heads=2 model.num_layers=2 model.fusion_layer=1 model.ffn_width=32
    model.embed_dim=16 model.pool_heads=2 model.patch_size=16 model.context_length=16
    moe.expert_width=16 batch.global_batch_size=8 batch.micro_batch_size=4 schedule.warmup_steps=0
    data.workers=1 data.shuffle_window=2 log.captions_every_steps=0 log.every_steps=1
""".split()


def train_arguments(run_dir: Path, *overrides: str, processes: int = 1) -> list[str]:
    engine = ["parallel.engine=plain"] if processes == 1 else []
    command = ["-m", "pretrain", "train", "tiny", "--out", str(run_dir)]
    return [*command, *SETTINGS, *overrides, *engine]


def launch(run_dir: Path, *overrides: str, processes: int = 1) -> LaunchResult:
    arguments = train_arguments(run_dir, *overrides, processes=processes)
    return run_ranks(arguments, processes=processes, timeout_seconds=120)


def train(run_dir: Path, *overrides: str, processes: int = 1) -> str:
    """Train, which must succeed; returns the output."""
    return launch(run_dir, *overrides, processes=processes).check().output


def train_until_killed(run_dir: Path, *overrides: str, steps: int) -> None:
    """Train, and kill the processes once this number of steps is logged."""
    command = [sys.executable, *train_arguments(run_dir, *overrides)]
    log = run_dir.with_suffix(".log")
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=clean_environment(),
            stdout=stream,
            stderr=stream,
            start_new_session=True,
        )
        deadline = time.monotonic() + 100
        while time.monotonic() < deadline and process.poll() is None:
            if len(losses(run_dir)) >= steps:
                os.killpg(process.pid, signal.SIGKILL)
            time.sleep(0.02)
    assert process.wait() == -signal.SIGKILL, log.read_text()[-3000:]


def check_ledger(run_dir: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "data_pipeline", "ledger", str(run_dir)]
    return subprocess.run(
        command, cwd=ROOT, env=clean_environment(), capture_output=True, text=True, timeout=60
    )


def losses(run_dir: Path) -> dict[int, float]:
    return {row["step"]: row["loss/total"] for row in read_rows(run_dir / "metrics.jsonl")}


def copy_without_manifest(shapes: ShapeDataset, folder: Path) -> Path:
    folder.mkdir()
    for shard in shapes.folder.glob("*.tar"):
        (folder / shard.name).write_bytes(shard.read_bytes())
    assert not (folder / MANIFEST_NAME).exists()
    return folder


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> tuple[ShapeDataset, ShapeDataset]:
    """Two datasets of 32 and 16 pairs with the same tokenizer."""
    folder = tmp_path_factory.mktemp("datasets")
    return (
        make_shape_dataset(folder / "large", pairs=32, samples_per_shard=8),
        make_shape_dataset(folder / "small", pairs=16, samples_per_shard=8),
    )


@pytest.fixture(scope="module")
def shapes(datasets: tuple[ShapeDataset, ShapeDataset]) -> ShapeDataset:
    return datasets[0]


def test_killed_run_resumes_a_mixture(
    datasets: tuple[ShapeDataset, ShapeDataset], tmp_path: Path
) -> None:
    run_dir, (large, small) = tmp_path / "run", datasets
    sources = (
        f"{{shards: {large.folder}, weight: 3, name: large}}",
        f"{{shards: {small.folder}, weight: 1, name: small}}",
    )
    settings = [
        *large.overrides,
        f"data.train=[{', '.join(sources)}]",
        "data.ledger=true",
        "data.filters.max_caption_chars=21",
        "checkpoint.every_steps=5",
    ]
    train_until_killed(run_dir, *settings, "schedule.total_steps=400", steps=12)
    killed_at = max(losses(run_dir))

    total_steps = 24 if killed_at < 20 else killed_at + 8
    output = train(run_dir, *settings, f"schedule.total_steps={total_steps}")
    assert "resumed from" in output
    verified = check_ledger(run_dir)
    assert verified.returncode == 0, verified.stdout + verified.stderr

    rows = read_rows(run_dir / "metrics.jsonl")
    last = rows[-1]
    assert last["data/sample_ratio/large"] == 0.75 and last["data/sample_ratio/small"] == 0.25
    assert last["data/epochs/small"] == last["step"] * 2 / 16
    # Captions such as "a small purple triangle" are filtered and counted, but are not corrupt.
    assert any(row.get("data/filtered/max-caption-chars", 0) > 0 for row in rows)
    assert read_rows(run_dir / "corrupt_samples.jsonl") == []


def test_new_phase_with_more_data(
    datasets: tuple[ShapeDataset, ShapeDataset], tmp_path: Path
) -> None:
    """Shards are added to the folder of a trained run, which has no manifest."""
    large, small = datasets
    folder, run_dir = copy_without_manifest(large, tmp_path / "data"), tmp_path / "run"
    settings = [*large.overrides, f"data.train=[{folder}]", "data.ledger=true"]
    train(run_dir, *settings, "schedule.total_steps=4")
    for shard in small.folder.glob("*.tar"):
        (folder / f"more-{shard.name}").write_bytes(shard.read_bytes())

    # In the same phase a run continues with the data that it began with, also under another name.
    output = train(run_dir, *settings, "schedule.total_steps=5")
    assert "2 shards were added and 0 removed" in output
    relative = os.path.relpath(folder, ROOT)
    train(run_dir, *settings, f"data.train=[{relative}]", "schedule.total_steps=6")
    new = [*settings, "data.phase=2"]
    output = train(run_dir, *new, "schedule.total_steps=12")
    assert "phase 2 of the data begins at position 48, with data (48 samples)" in output
    verified = check_ledger(run_dir)
    assert verified.returncode == 0, verified.stdout + verified.stderr
    assert "from 48: 48 samples" in verified.stdout
    assert read_rows(run_dir / "metrics.jsonl")[-1]["data/epochs/data"] == 1.0

    output = train(run_dir, *new, "schedule.total_steps=14")  # a phase begins once
    assert "begins at position" not in output and check_ledger(run_dir).returncode == 0
    result = launch(run_dir, *settings, "schedule.total_steps=16")
    assert result.returncodes == (2,) and "data.phase is 1" in result.output

    # A start of the next phase that fails does not decide which shards the phase has.
    third = [*settings, "data.phase=3"]
    result = launch(run_dir, *third, "schedule.total_steps=14")
    assert result.returncodes == (2,) and "needs more schedule.total_steps" in result.output
    (folder / "last.tar").write_bytes(next(small.folder.glob("*.tar")).read_bytes())
    output = train(run_dir, *third, "schedule.total_steps=15")
    assert "phase 3 of the data begins at position 112, with data (56 samples)" in output
    ratio = read_rows(run_dir / "metrics.jsonl")[-1]["data/sample_ratio/data"]
    assert ratio == 1.0 and check_ledger(run_dir).returncode == 0


def test_truncated_ledger(shapes: ShapeDataset, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    train(run_dir, *shapes.overrides, "data.ledger=true", "schedule.total_steps=3")
    verified = check_ledger(run_dir)
    assert verified.returncode == 0 and "1 to 3" in verified.stdout

    path = run_dir / "ledger" / "rank-00000.ledger"
    path.write_bytes(path.read_bytes()[:-100])
    # Without the record of the last step, the report must not claim three steps.
    assert "1 to 3" not in check_ledger(run_dir).stdout


def test_shards_without_manifest_give_equal_losses(shapes: ShapeDataset, tmp_path: Path) -> None:
    bare = copy_without_manifest(shapes, tmp_path / "bare")
    steps = "schedule.total_steps=4"
    train(tmp_path / "with", *shapes.overrides, steps)
    output = train(tmp_path / "without", *shapes.overrides, f"data.train=['{bare}/*.tar']", steps)
    assert "has no manifest" in output and "vlmoe data index" in output
    assert losses(tmp_path / "without") == losses(tmp_path / "with") != {}
    assert not (bare / MANIFEST_NAME).exists(), "training wrote to the folder of the shards"


@pytest.mark.distributed
def test_two_ranks_index_shards_without_manifest(shapes: ShapeDataset, tmp_path: Path) -> None:
    bare, run_dir = copy_without_manifest(shapes, tmp_path / "bare"), tmp_path / "run"
    eval_set = copy_without_manifest(shapes, tmp_path / "eval")
    settings = [
        f"data.train=[{bare}]",
        f"eval.sets=[{{name: a, shards: {eval_set}}}]",
        "log.captions_every_steps=2",
        "schedule.total_steps=2",
        "data.ledger=true",
    ]
    output = train(run_dir, *shapes.overrides, *settings, processes=2)
    assert output.count("has no manifest") == 2  # once for each address, not for each rank

    paths = list((run_dir / "manifests").glob("*/manifest.json"))
    manifests: list[dict[str, Any]] = [json.loads(path.read_text()) for path in paths]
    assert [manifest["total_samples"] for manifest in manifests] == [32, 32]
    assert check_ledger(run_dir).returncode == 0


def test_filter_that_rejects_all_samples(shapes: ShapeDataset, tmp_path: Path) -> None:
    settings = ["data.filters.min_side=1000", "schedule.total_steps=3"]
    result = launch(tmp_path / "run", *shapes.overrides, *settings)
    assert result.returncodes == (2,), result.output
    assert "32 of 32 samples that were tried are skipped (filter:min-side 32" in result.output
