"""Errors of invalid settings: raised before torch is loaded and before a folder is created."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.bad_input import SMALL_MODEL, Workspace, assert_contains, one_error
from tests.support.command_server import CommandRunner
from tests.support.launch import torchrun

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]


@pytest.mark.parametrize(
    ("setting", "parts"),
    [
        ("moe.top_kk=3", ("preset tiny", "moe.top_kk", "did you mean 'moe.top_k'?")),
        (
            "batch.global_batch_size=7",
            (
                "batch.global_batch_size is 7",
                "batch.micro_batch_size (4) x 1 rank ",
                "batch.global_batch_size=8, or batch.micro_batch_size=1",
            ),
        ),
        (
            "parallel.expert_parallel_size=8",
            ("parallel.expert_parallel_size is 8", "4 experts", "at most 1 with 1 rank"),
        ),
        ("parallel.expert_parallel_size=3", ("does not divide moe.num_experts (4)", "1, 2, 4")),
        ("data.train=[]", ("data.train is empty", "manifests")),
    ],
)
def test_invalid_setting(workspace: Workspace, setting: str, parts: tuple[str, ...]) -> None:
    assert_contains(workspace.train_error(setting), *parts)
    assert not workspace.run_dir.exists()


def test_unknown_preset(vlmoe: CommandRunner, tmp_path: Path) -> None:
    result = vlmoe(["train", "tinny", "--out", str(tmp_path / "run")])
    assert_contains(one_error(result), "tinny: no such file", "preset", "did you mean 'tiny'?")


def test_error_is_printed_by_one_rank(workspace: Workspace) -> None:
    settings = workspace.train_arguments(*SMALL_MODEL, "parallel.expert_parallel_size=8")
    result = torchrun(["-m", "pretrain", *settings], processes=2, timeout_seconds=60)
    assert_contains(one_error(result, rank="rank 0"), "4 experts", "at most 2 with 2 ranks")
