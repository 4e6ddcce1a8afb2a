"""Resuming from a corrupt checkpoint, or with settings that do not match it."""

from __future__ import annotations

import os

import pytest

from tests.support.bad_input import Workspace, assert_contains, file_contents
from tests.support.corruption import flip_bit

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]


@pytest.mark.parametrize(
    ("setting", "parts"),
    [
        (
            "model.width=64",
            ("[16] in the checkpoint, and [32]", "model, moe and balance", "config.yaml"),
        ),
        ("model.num_layers=3", ("'blocks.2.", "none in the checkpoint", "config.yaml")),
        ("moe.num_experts=8", ("[4, ", "in the checkpoint, and [8, ", "config.yaml")),
        ("seed=7", ("seed is 7", "saved with seed 0", "restore the seed")),
    ],
)
def test_setting_differs_from_checkpoint(
    trained_workspace: Workspace, setting: str, parts: tuple[str, ...]
) -> None:
    contents = file_contents(trained_workspace.run_dir)
    assert_contains(trained_workspace.train_error("schedule.total_steps=6", setting), *parts)
    assert file_contents(trained_workspace.run_dir) == contents


def test_other_engine_and_precision(trained_workspace: Workspace) -> None:
    settings = ["schedule.total_steps=6", "parallel.engine=deepspeed", "parallel.deepspeed=zero3"]
    result = trained_workspace.train(*settings, "precision.compute=bf16").check()
    assert "resumed from" in result.output
    assert trained_workspace.logged_steps() == [1, 2, 3, 4, 5, 6]


def test_corrupt_checkpoint_falls_back_to_older_one(trained_workspace: Workspace) -> None:
    checkpoints = trained_workspace.run_dir / "checkpoints"
    weights = checkpoints / "step-00000004" / "state-00000.safetensors"
    flip_bit(weights, weights.stat().st_size - 500)
    result = trained_workspace.train("schedule.total_steps=6").check()
    assert_contains(result.output, f"{weights} has SHA-256", "step-00000002: step 2,")
    assert trained_workspace.logged_steps() == [1, 2, 3, 4, 5, 6]


def test_no_intact_checkpoint(trained_workspace: Workspace) -> None:
    checkpoints = trained_workspace.run_dir / "checkpoints"
    for weights in checkpoints.glob("*/state-00000.safetensors"):
        os.truncate(weights, 100)
    assert_contains(
        trained_workspace.train_error("schedule.total_steps=6"),
        f"no checkpoint in {checkpoints} is intact",
        "move the folder away",
    )
