"""Runs one part of the GPU suite in a subprocess with a time limit."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from pathlib import Path

from tools.arguments import import_peers
from tools.gpu_suite.parts import PARTS
from tools.gpu_suite.results import Check, Report
from tools.measurements import not_measured

GRACE_SECONDS = 3.0
"""Time beyond its budget before a part is killed; it starts nothing new in this time."""
QUIET_LOGS = {"TORCH_CPP_LOG_LEVEL": "ERROR", "KINETO_LOG_LEVEL": "6"}
"""Silences warnings of torch's profiler."""
PROJECT_PACKAGES = ("pretrain", "data_pipeline", "tools")


def run_part(name: str, budget: float, scratch: Path, options: argparse.Namespace) -> Report:
    """Run a part in a subprocess and kill it when its time is up.

    Args:
        name: Key of `PARTS`.
        budget: Seconds.
        scratch: Folder for the part's report and data.
        options: Options of the command line.

    Returns:
        What the part reported before it ended. A crash adds a failed check. So does a timeout,
        unless the part had less than its budget or consists of measurements only.
    """
    path = scratch / f"{name}.json"
    process = subprocess.Popen(
        part_command(name, budget, path, options),
        start_new_session=True,
        env=QUIET_LOGS | os.environ,
    )
    failure = timeout = ""
    try:
        if status := process.wait(timeout=budget + GRACE_SECONDS):
            failure = f"exited with status {status}; see its output above"
    except subprocess.TimeoutExpired:
        timeout = f"timed out after {budget:.0f} s"
    finally:
        _kill_group(process)

    report = Report()
    if path.exists():
        report = Report.from_json(json.loads(path.read_text(encoding="utf-8")))
    if timeout and (PARTS[name].only_measurements or budget < PARTS[name].seconds):
        report.measurements.append(not_measured("remaining measurements", timeout))
    elif failure or timeout:
        report.checks.append(Check(name="completes", passed=False, note=failure or timeout))
    return report


def part_command(name: str, budget: float, path: Path, options: argparse.Namespace) -> list[str]:
    """Command line of a part's subprocess."""
    command = [
        *(sys.executable, "-m", "tools.gpu_suite", "--run-part", name),
        *("--seconds", str(budget)),
        *("--out", str(path)),
        *("--scratch", str(path.parent)),
    ]
    if options.cpu:
        command.append("--cpu")
    for folder in options.peers:
        command += ["--peers", str(folder)]
    return command


def run_in_this_process(options: argparse.Namespace) -> int:
    """Run the part `options.run_part` in this process; returns the exit status.

    A part whose packages are not installed is reported as skipped.
    """
    # Before the imports: they take seconds, which the parent process counts.
    deadline = time.monotonic() + options.seconds
    import_peers(options.peers)
    part, report = PARTS[options.run_part], Report(path=options.out)
    report.write()
    try:
        import torch

        from tools.gpu_suite.options import Options

        on_gpu = torch.cuda.is_available() and not options.cpu
        if not on_gpu:
            from tools.bench_moe.__main__ import prepare_cpu

            prepare_cpu()
        part_options = Options(
            device=torch.device("cuda" if on_gpu else "cpu"),
            scratch=options.scratch,
            deadline=deadline,
        )
        module, _, function = part.entry_point.partition(":")
        run: Callable[[Options, Report], None] = getattr(
            import_module(f"tools.gpu_suite.{module}"), function
        )
        run(part_options, report)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in PROJECT_PACKAGES:
            raise
        report.skip(f"{error.name} is not installed")
    return 0


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kill a part and all processes that it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
