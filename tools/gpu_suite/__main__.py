"""`python -m tools.gpu_suite`: on one GPU, with this checkout and torch, everything that only a GPU
can tell.

Each part runs in a process of its own with a time budget of its own, so that one that crashes or
hangs costs the others nothing. What is not installed is left out and named, and so is what does not
fit into the time. Without a GPU the same parts run on the CPU with hardly any numbers, to see that
they run.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from tools.benchmark import machine, note, table, write_json
from tools.figures import skipped
from tools.gpu_suite.results import HEAD, Check, Report, figure_row

PACKAGES = ("torch", "deepspeed", "torchtitan", "triton", "numpy")
TOTAL_SECONDS = 530.0
GRACE_SECONDS = 3.0
"""What a part may take over its budget before it is ended; it begins nothing new in that time."""
LEAST_SHARE = 0.5
"""A part is begun while this share of its budget is left."""
QUIET = {"TORCH_CPP_LOG_LEVEL": "ERROR", "KINETO_LOG_LEVEL": "6"}
"""Torch's profiler is talkative."""


class Part(NamedTuple):
    """One thing to find out."""

    tells: str
    seconds: float
    """Its budget on a GPU."""
    home: str
    """Module and function."""
    only_figures: bool = False
    """Whether nothing has failed when it does not come to its end."""


PARTS = {
    "layer": Part(
        "layer in bfloat16 against float32, GPU against CPU", 55, "numbers:layer_numbers"
    ),
    "step": Part("a whole training step likewise", 55, "numbers:step_numbers"),
    "waits": Part("waits of the host inside an MoE layer", 45, "synchronizations:synchronizations"),
    "speed": Part(
        "layer against other layers, and against what is possible",
        150,
        "speed:layer_speed",
        only_figures=True,
    ),
    "tiny": Part("a short real run of the preset tiny", 90, "runs:tiny_run"),
    "s16": Part("a short real run of the preset s16", 130, "runs:s16_run"),
}

EXAMPLES = """\
examples:
  python -m tools.gpu_suite                            everything, under nine minutes
  python -m tools.gpu_suite --only layer --only waits  some parts
  python -m tools.gpu_suite --peers peers              look for torchtitan in a folder (pip install --target peers)
  python -m tools.gpu_suite --cpu                      do the parts run at all? (the figures mean nothing)
"""


def main(arguments: list[str] | None = None) -> int:
    """Run the parts, print a table last, write JSON; 1 when a check failed, 2 for wrong words."""
    options = _parse(arguments)
    if unknown := [name for name in options.only if name not in PARTS]:
        print(
            f"error: --only {unknown[0]}: no such part; there are {', '.join(PARTS)}",
            file=sys.stderr,
        )
        return 2
    if options.inside:
        return inside(options)
    began = time.monotonic()
    reports: dict[str, Report] = {}
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="vlmoe-gpu-") as scratch:
        for name in options.only or PARTS:
            left = options.seconds - (time.monotonic() - began)
            if left < LEAST_SHARE * PARTS[name].seconds:
                reports[name] = Report(
                    skipped=f"no time left: {max(0.0, left):.0f} of {options.seconds:.0f} s, but it "
                    f"may take {PARTS[name].seconds:.0f} s"
                )
                continue
            note(f"== {name}: {PARTS[name].tells}")
            at = time.monotonic()
            reports[name] = run_part(name, min(PARTS[name].seconds, left), Path(scratch), options)
            seconds[name] = round(time.monotonic() - at, 1)
    return tell(reports, seconds, options)


def run_part(name: str, budget: float, scratch: Path, options: argparse.Namespace) -> Report:
    """Run a part in a process of its own, and end it when its time is up."""
    path = scratch / f"{name}.json"
    process = subprocess.Popen(
        _command(name, budget, path, options), start_new_session=True, env=QUIET | os.environ
    )
    problem = too_long = ""
    try:
        code = process.wait(timeout=budget + GRACE_SECONDS)
        if code:
            problem = f"ended with status {code}; see above"
    except subprocess.TimeoutExpired:
        too_long = f"did not end within its {budget:.0f} s"
    finally:
        _end_group(process)
    report = (
        Report.from_json(json.loads(path.read_text(encoding="utf-8")))
        if path.exists()
        else Report()
    )
    if too_long and (PARTS[name].only_figures or budget < PARTS[name].seconds):
        report.figures.append(skipped("what is not told above", too_long))
    elif problem := problem or too_long:
        report.checks.append(Check(name="runs to its end", passed=False, note=problem))
    return report


def _command(name: str, budget: float, path: Path, options: argparse.Namespace) -> list[str]:
    """What a part's process is started with."""
    command = [
        sys.executable,
        "-m",
        "tools.gpu_suite",
        "--inside",
        name,
        "--seconds",
        str(budget),
        "--out",
        str(path),
        "--scratch",
        str(path.parent),
        *(["--cpu"] if options.cpu else []),
    ]
    return command + [word for folder in options.peers for word in ("--peers", str(folder))]


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """End a part and all that it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def inside(options: argparse.Namespace) -> int:
    """One part, in this process."""
    for folder in options.peers:
        sys.path.append(str(folder))
    deadline = (
        time.monotonic() + options.seconds
    )  # first: imports take seconds, and who waits outside counts them
    part, report = PARTS[options.inside], Report(path=options.out)
    report.write()
    try:
        import torch

        from tools.gpu_suite.options import Options

        on_gpu = torch.cuda.is_available() and not options.cpu
        if not on_gpu:
            from tools.bench_moe.__main__ import prepare_cpu

            prepare_cpu()
        given = Options(
            device=torch.device("cuda" if on_gpu else "cpu"),
            scratch=options.scratch,
            deadline=deadline,
        )
        module, _, function = part.home.partition(":")
        work: Callable[[Options, Report], None] = getattr(
            import_module(f"tools.gpu_suite.{module}"), function
        )
        work(given, report)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in ("pretrain", "data_pipeline", "tools"):
            raise
        report.skip(f"{error.name} is not installed")
    return 0


def tell(reports: dict[str, Report], seconds: dict[str, float], options: argparse.Namespace) -> int:
    """The table and the file."""
    rows: list[list[str]] = []
    for name, report in reports.items():
        rows += [check.row(name) for check in report.checks]
        rows += [figure_row(name, line) for line in report.figures]
        if report.skipped:
            rows.append([name, PARTS[name].tells, "-", "", "left out", report.skipped])
    checks = [(name, check) for name, report in reports.items() for check in report.checks]
    failed = [f"{name}: {check.name}" for name, check in checks if not check.passed]
    about = machine(PACKAGES) | _gpu(options.cpu)
    write_json(
        options.out,
        {
            "machine": about,
            "seconds": seconds,
            "failed": failed,
            "parts": {name: report.to_json() for name, report in reports.items()},
        },
    )
    note(f"also in {options.out}; seconds: {seconds}")
    print(f"\n{about['gpu']}, {about['date']}, torch {about['torch']}\n")
    print(table(rows, HEAD))
    return int(bool(failed))


def _gpu(cpu: bool) -> dict[str, str]:
    import torch

    on_gpu = torch.cuda.is_available() and not cpu
    return {"gpu": torch.cuda.get_device_name() if on_gpu else "no GPU: the figures mean nothing"}


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.gpu_suite",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    shown = ", ".join(f"{name} ({part.seconds:.0f} s)" for name, part in PARTS.items())
    parser.add_argument(
        "--only", action="append", default=[], metavar="PART", help=f"may be given again: {shown}"
    )
    parser.add_argument("--cpu", action="store_true", help="on the CPU even where there is a GPU")
    parser.add_argument(
        "--seconds", type=float, default=TOTAL_SECONDS, help="for all parts together (%(default)s)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("data/bench/gpu.json"), help="the report (%(default)s)"
    )
    parser.add_argument(
        "--peers",
        type=Path,
        action="append",
        default=[],
        metavar="FOLDER",
        help="a folder of packages (pip install --target) in which to look for torchtitan",
    )
    parser.add_argument("--inside", choices=tuple(PARTS), help=argparse.SUPPRESS)
    parser.add_argument("--scratch", type=Path, default=Path("data/bench"), help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
