"""Training runs with bad input: corrupt shards, invalid settings, full disks, killed ranks.

A `Workspace` has shards that a test may corrupt and trains on them with a very small model.
`one_error` checks that a command printed exactly one error, exited with status 2 and printed no
traceback.
"""

from __future__ import annotations

import os
import re
import signal
import time
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from pretrain.train.jsonl import read_rows
from tests.support.command_server import CommandRunner
from tests.support.launch import LaunchResult
from tests.support.processes import process_environments

SMALL_MODEL = """
    model.width=32 model.num_layers=2 model.fusion_layer=1 model.num_heads=2 model.ffn_width=32
    model.image_size=16 model.context_length=16 model.embed_dim=16 model.pool_heads=2
    moe.num_experts=4 moe.expert_width=16 moe.shared_experts=0
    batch.global_batch_size=8 batch.micro_batch_size=4
    schedule.total_steps=4 schedule.warmup_steps=1 checkpoint.every_steps=2
    data.workers=0 data.timeout_seconds=60 data.shard_seconds=20
    log.every_steps=1 log.captions_every_steps=0
""".split()
ONE_PROCESS = [*SMALL_MODEL, "parallel.engine=plain"]
ENDLESS = "schedule.total_steps=1000000 checkpoint.every_steps=0 log.every_steps=10".split()

_LAUNCH_ID = "BAD_INPUT_TEST"


@dataclass(frozen=True, kw_only=True)
class Workspace:
    """A copy of the shards that a test may corrupt, and a run folder."""

    vlmoe: CommandRunner
    shards: Path
    run_dir: Path
    tokenizer: Path

    def train_arguments(self, *settings: str) -> list[str]:
        """Arguments of `vlmoe` for a run on these shards."""
        data = [
            f"data.train=['{self.shards}']",
            f"data.tokenizer={self.tokenizer}",
            "model.vocab_size=288",
        ]
        return ["train", "tiny", "--out", str(self.run_dir), *data, *settings]

    def train(self, *settings: str, env: Mapping[str, str | None] | None = None) -> LaunchResult:
        """Train in one process; `env` as for `command_server`."""
        arguments = self.train_arguments(*ONE_PROCESS, *settings)
        return self.vlmoe(arguments, timeout_seconds=60.0, env=env)

    def train_error(self, *settings: str) -> str:
        """Train in one process; returns the one error that it must print."""
        return one_error(self.train(*settings))

    def shard_path(self, index: int) -> Path:
        return self.shards / f"shard-{index:06d}.tar"

    def logged_steps(self) -> list[int]:
        return [row["step"] for row in read_rows(self.run_dir / "metrics.jsonl")]


def one_error(result: LaunchResult, *, rank: str = "") -> str:
    """The text of the only error in an output, on one line.

    Args:
        result: A failed launch; torchrun may append its own summary to the output.
        rank: The rank that the error must name, such as `rank 0`; empty for none.
    """
    output, launcher_output = split_launcher_output(result.output)
    expected_status = 1 if launcher_output else 2
    assert result.returncodes == (expected_status,), (
        f"status {result.returncodes} after {result.seconds:.0f} s:\n{output[-3000:]}"
    )
    assert "Traceback" not in output, output[-3000:]

    errors = re.findall(r"^error.*\n(?:  .*\n)*", output, flags=re.MULTILINE)
    assert len(errors) == 1, output[-3000:]
    assert output.endswith(errors[0]), f"there is output after the error:\n{output[-3000:]}"
    prefix = f"error ({rank}): " if rank else "error: "
    assert errors[0].startswith(prefix), errors[0]
    return " ".join(errors[0].removeprefix(prefix).split())


def split_launcher_output(output: str) -> tuple[str, str]:
    """The output of the ranks, and the output of torchrun that follows it."""
    launcher_line = re.search(
        r"^[WE]\d{4} [0-9:.]+ \d+ .*torch/distributed/elastic", output, flags=re.MULTILINE
    )
    if launcher_line is None:
        return output, ""
    return output[: launcher_line.start()], output[launcher_line.start() :]


def assert_contains(message: str, *parts: str) -> None:
    missing = [part for part in parts if part not in message]
    assert not missing, f"{missing} not in: {message}"


def file_contents(run_dir: Path) -> dict[str, bytes]:
    """Contents by path of every file of a run folder that training reads when it resumes."""
    paths = [*run_dir.glob("*.*"), *run_dir.glob("checkpoints/**/*")]
    return {str(path): path.read_bytes() for path in paths if path.is_file()}


def launch_and_signal(
    launch: Callable[[dict[str, str]], LaunchResult],
    run_dir: Path,
    *,
    rank: int,
    signal_number: signal.Signals,
) -> tuple[LaunchResult, float]:
    """Send a signal to one rank as soon as metrics are logged.

    Args:
        launch: Starts the run with these additional environment variables.
        run_dir: The run folder.
        rank: The rank that receives the signal.
        signal_number: The signal.

    Returns:
        The result, and the seconds between the signal and the end of the run.
    """
    launch_id = uuid.uuid4().hex
    with ThreadPoolExecutor(1) as pool:
        launched = pool.submit(launch, {_LAUNCH_ID: launch_id})
        metrics = run_dir / "metrics.jsonl"
        while not launched.done() and not (metrics.exists() and metrics.stat().st_size):
            time.sleep(0.05)

        os.kill(_find_process({f"{_LAUNCH_ID}={launch_id}", f"RANK={rank}"}), signal_number)
        signaled_at = time.monotonic()
        return launched.result(), time.monotonic() - signaled_at


def _find_process(variables: set[str]) -> int:
    """Id of the one process that has all these environment variables."""
    (process,) = [
        process for process, environment in process_environments() if variables <= environment
    ]
    return process
