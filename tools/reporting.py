"""Output of benchmarks: progress messages, numbers, and the machine description."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any


def describe_machine(packages: Sequence[str] = ()) -> dict[str, Any]:
    """Hardware, load and package versions of this machine, for a report."""
    if hasattr(os, "sched_getaffinity"):
        cores: int | None = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count()
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "cpu": _cpu_model() or platform.processor() or platform.machine(),
        "cores": cores,
        "memory_gib": round(memory_bytes / 2**30, 1),
        "kernel": platform.release(),
        "nice": os.nice(0),
        "load": [round(load, 2) for load in os.getloadavg()],
        "python": platform.python_version(),
        **{package: package_version(package) for package in packages},
    }


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return ""
    for line in info.read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return ""


def package_version(package: str) -> str:
    """Version of an installed package, or "not installed"."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def format_number(value: float) -> str:
    """Format a number with about three significant digits."""
    if value >= 1000:
        return f"{value:,.0f}"
    if value >= 100:
        return f"{value:.0f}"
    if value >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}" if value >= 0.1 else f"{value:.4f}"


def log_progress(text: str) -> None:
    """Print progress to stderr; stdout is for results."""
    print(text, file=sys.stderr, flush=True)
