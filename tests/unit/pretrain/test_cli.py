"""The command line: help, overrides, usage errors and expected errors."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

import pretrain
from pretrain.cli.main import build_parser, main

GROUPS: list[list[str]] = [[], ["data"], ["tokenizer"]]
COMMANDS = [
    *GROUPS,
    ["train"],
    ["plan"],
    ["settings"],
    ["parity"],
    ["eval"],
    ["caption"],
    ["routing"],
    ["data", "index"],
    ["data", "order"],
    ["tokenizer", "train"],
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_has_help(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        main([*command, "--help"])
    text = capsys.readouterr().out
    assert raised.value.code == 0
    assert text.startswith(" ".join(["usage: vlmoe", *command]))
    assert ("examples:" in text) == (command not in GROUPS)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"vlmoe {pretrain.__version__}\n"


def test_examples_of_the_help_can_be_parsed(capsys: pytest.CaptureFixture[str]) -> None:
    num_examples = 0
    for command in COMMANDS:
        with pytest.raises(SystemExit):
            main([*command, "--help"])
        for line in capsys.readouterr().out.splitlines():
            if line.startswith("  vlmoe "):
                build_parser().parse_known_args(line.split()[1:])
                num_examples += 1
    assert num_examples >= 12


@pytest.mark.parametrize(
    "arguments",
    [
        ["plan", "tiny", "--world-size", "2", "optim.lr=2e-3", "--json", "seed=4"],
        ["plan", "tiny", "optim.lr=2e-3", "seed=4", "--json", "--world-size", "2"],
        ["plan", "--json", "--world-size", "2", "tiny", "optim.lr=2e-3", "seed=4"],
    ],
)
def test_overrides_before_and_after_options(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 0
    assert json.loads(capsys.readouterr().out)["layout"]["world_size"] == 2
    assert main([*arguments, "optim.lr=-1"]) == 2
    assert "optim.lr is -1.0" in capsys.readouterr().err


def test_an_unknown_setting_is_one_line_and_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "tiny", "moe.tpo_k=2"]) == 2
    printed, error = capsys.readouterr()
    assert printed == ""
    assert error.startswith("error: ") and error.count("\n") == 1
    assert "moe.tpo_k" in error and "'moe.top_k'" in error


def test_train_validates_before_it_creates_the_run_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "tiny", "--out", str(tmp_path / "run"), "optim.lrr=1"]) == 2
    error = capsys.readouterr().err
    assert "optim.lrr" in error and "'optim.lr'" in error
    assert not (tmp_path / "run").exists()


def test_errors_name_the_rank(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert main(["plan", "nosuch"]) == 2
    assert capsys.readouterr().err.startswith("error (rank 3): nosuch")


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["nosuch"],
        ["train", "tiny"],
        ["plan", "tiny", "--nosuch"],
        ["plan", "tiny", "--world-size", "0"],
        ["plan", "tiny", "--wor", "2"],
        ["eval", "x", "y"],
        ["eval", "run", "--labels", "x"],
    ],
)
def test_invalid_arguments_print_the_usage(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as raised:
        main(arguments)
    assert raised.value.code == 2
    assert capsys.readouterr().err.startswith("usage: vlmoe")


def test_python_m_pretrain_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pretrain", "plan", "tiny"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0 and "5.215M total" in done.stdout


def test_torchrun_ends_its_report_with_the_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    path = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(path))
    assert main(["plan", "tiny", "moe.tpo_k=2"]) == 2
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=2, error_file=str(path))
    report = ChildFailedError("vlmoe", {0: failure}).format_msg()
    assert "moe.tpo_k" in report.splitlines()[-2]
    assert abs(failure.timestamp - time.time()) < 60

    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "no" / "error.json"))
    assert main(["plan", "tiny", "moe.tpo_k=2"]) == 2
