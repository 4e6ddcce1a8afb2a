"""`python -m tools.gpu_suite`: checks and benchmarks that require a GPU.

Each part runs in its own process with its own time budget, so a crash or hang does not affect the
others. Parts that lack a package or time are skipped and listed. Without a GPU the parts run on the
CPU with minimal sizes, to test that they run.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from data_pipeline.common.json_file import write_json
from data_pipeline.common.tables import markdown_table
from tools.arguments import benchmark_parser, print_error, unknown_name
from tools.gpu_suite.parts import PARTS
from tools.gpu_suite.results import HEADER, Report, measurement_row
from tools.gpu_suite.runner import run_in_this_process, run_part
from tools.reporting import describe_machine, log_progress

PACKAGES = ("torch", "deepspeed", "torchtitan", "triton", "numpy")
TOTAL_SECONDS = 530.0
MIN_BUDGET_FRACTION = 0.5
"""A part is started only if at least this fraction of its budget is left."""

EXAMPLES = """\
examples:
  python -m tools.gpu_suite                           all parts, under nine minutes
  python -m tools.gpu_suite --only layer --only sync  selected parts
  python -m tools.gpu_suite --peers peers             with torchtitan from a folder
                                                      (pip install --target peers ...)
  python -m tools.gpu_suite --cpu                     check that it runs (meaningless numbers)
"""


def main(arguments: list[str] | None = None) -> int:
    """Run the parts, write a JSON report, print a table at the end.

    Returns:
        0; 1 if a check failed; 2 for invalid options.
    """
    options = _parse(arguments)
    if problem := unknown_name(options.only, PARTS, "part"):
        return print_error(problem)
    if options.run_part:
        return run_in_this_process(options)

    start = time.monotonic()
    reports: dict[str, Report] = {}
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="vlmoe-gpu-") as scratch:
        for name in options.only or PARTS:
            part = PARTS[name]
            left = options.seconds - (time.monotonic() - start)
            if left < MIN_BUDGET_FRACTION * part.seconds:
                reports[name] = Report(
                    skipped=f"no time left: {max(0.0, left):.0f} of {options.seconds:.0f} s, "
                    f"budget {part.seconds:.0f} s"
                )
                continue
            log_progress(f"== {name}: {part.description}")
            part_start = time.monotonic()
            reports[name] = run_part(name, min(part.seconds, left), Path(scratch), options)
            seconds[name] = round(time.monotonic() - part_start, 1)
    return write_report(reports, seconds, options)


def write_report(
    reports: dict[str, Report], seconds: dict[str, float], options: argparse.Namespace
) -> int:
    """Write the JSON report and print the table; returns 1 if a check failed."""
    rows: list[list[str]] = []
    failed: list[str] = []
    for name, report in reports.items():
        rows += [check.row(name) for check in report.checks]
        rows += [measurement_row(name, measurement) for measurement in report.measurements]
        if report.skipped:
            rows.append([name, PARTS[name].description, "-", "", "skipped", report.skipped])
        failed += [f"{name}: {check.name}" for check in report.checks if not check.passed]

    machine = describe_machine(PACKAGES) | {"gpu": _gpu_name(options.cpu)}
    write_json(
        options.out,
        {
            "machine": machine,
            "seconds": seconds,
            "failed": failed,
            "parts": {name: report.to_json() for name, report in reports.items()},
        },
    )
    log_progress(f"wrote {options.out}; seconds: {seconds}")
    print(f"\n{machine['gpu']}, {machine['date']}, torch {machine['torch']}\n")
    print(markdown_table(HEADER, rows, align="l"))
    return int(bool(failed))


def _gpu_name(cpu: bool) -> str:
    import torch

    if torch.cuda.is_available() and not cpu:
        return torch.cuda.get_device_name()
    return "no GPU: the measurements are meaningless"


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    budgets = "parts: " + ", ".join(
        f"{name} ({part.seconds:.0f} s)" for name, part in PARTS.items()
    )
    parser = benchmark_parser(
        "tools.gpu_suite",
        __doc__,
        EXAMPLES + budgets,
        out="data/bench/gpu.json",
        unit="part",
        peers="torchtitan",
    )
    parser.add_argument("--cpu", action="store_true", help="use the CPU even if there is a GPU")
    parser.add_argument(
        "--seconds",
        type=float,
        default=TOTAL_SECONDS,
        help="time limit of all parts in total (default: %(default)s)",
    )
    # For the subprocess of a part.
    parser.add_argument("--run-part", choices=tuple(PARTS), help=argparse.SUPPRESS)
    parser.add_argument("--scratch", type=Path, default=Path("data/bench"), help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
