"""Starts the GPU suite as a process."""

from __future__ import annotations

import subprocess
import sys

from tests.support.launch import ROOT, clean_environment


def run_suite(*arguments: str, timeout: int = 200) -> subprocess.CompletedProcess[str]:
    """Run `python -m tools.gpu_suite` with these arguments."""
    return subprocess.run(
        [sys.executable, "-m", "tools.gpu_suite", *arguments],
        cwd=ROOT,
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
