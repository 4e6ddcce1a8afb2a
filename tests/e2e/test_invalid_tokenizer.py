"""Errors of a tokenizer that is missing, invalid, or not the one of the run."""

from __future__ import annotations

import pytest

from data_pipeline.preparing.tokenizer_training import train_tokenizer
from tests.support.bad_input import Workspace, assert_contains, file_contents
from tests.support.shape_dataset import CAPTIONS

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]


def test_missing_tokenizer(workspace: Workspace) -> None:
    path = workspace.run_dir.parent / "missing.model"
    error = workspace.train_error(f"data.tokenizer={path}")
    assert_contains(error, f"cannot read the tokenizer {path}", "`vlmoe tokenizer train`")


def test_not_a_tokenizer(workspace: Workspace) -> None:
    error = workspace.train_error(f"data.tokenizer={workspace.shards}/manifest.json")
    assert_contains(error, "manifest.json", "SentencePiece", "`vlmoe tokenizer train`")


def test_vocab_size_mismatch(workspace: Workspace) -> None:
    assert_contains(
        workspace.train_error("model.vocab_size=300"),
        "model.vocab_size is 300",
        str(workspace.tokenizer),
        "has 288 tokens",
        "model.vocab_size=288",
    )


def test_resume_with_another_tokenizer(trained_workspace: Workspace) -> None:
    run_dir = trained_workspace.run_dir
    smaller, same_size = run_dir.parent / "smaller.model", run_dir.parent / "same-size.model"
    train_tokenizer(CAPTIONS, smaller, vocab_size=284)
    train_tokenizer(CAPTIONS[:50], same_size, vocab_size=288)
    contents = file_contents(run_dir)
    assert_contains(
        trained_workspace.train_error(f"data.tokenizer={smaller}", "model.vocab_size=284"),
        f"{run_dir} was trained with another tokenizer",
        str(smaller),
        f"data.tokenizer={run_dir}",
    )
    assert file_contents(run_dir) == contents

    # Without the copy in the run folder, the checkpoint still has the tokenizer's fingerprint.
    (run_dir / "tokenizer.model").unlink()
    settings = "schedule.total_steps=6", f"data.tokenizer={same_size}"
    assert_contains(
        trained_workspace.train_error(*settings),
        "step-00000004 was trained with another tokenizer",
        str(same_size),
        "Set data.tokenizer",
    )
