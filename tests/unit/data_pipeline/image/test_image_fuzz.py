"""Fuzzing of the sample decoders with thousands of corrupt and random inputs.

None may crash, hang or exhaust the memory; each must be processed or raise a DataError with a slug.
The inputs are processed in a child process.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.support.launch import ROOT, clean_environment

OUTCOMES = {
    "images": {"accepted", "corrupt-image"},
    "captions": {"accepted", "empty", "invalid-text", "caption-too-long"},
    "json": {"accepted", "empty", "invalid-json", "invalid-text"},
}
MAX_SECONDS = 3.0
"""CPU time limit per input; the slowest input took a third of it."""
MAX_MIB = 1024


def fuzz(target: str, first_seed: int, count: int) -> dict[str, Any]:
    """Process `count` inputs; see `tests/support/fuzz_content.py`."""
    completed = subprocess.run(
        [sys.executable, "-m", "tests.support.fuzz_content", target, str(first_seed), str(count)],
        cwd=ROOT,
        env=clean_environment(),
        text=True,
        capture_output=True,
        timeout=280,
        errors="replace",
    )
    # The status is negative if a decoder crashed, and 1 with a traceback for other exceptions.
    assert completed.returncode == 0, f"status {completed.returncode}: {completed.stderr[-3000:]}"
    report: dict[str, Any] = json.loads(completed.stdout.splitlines()[-1])
    return report


@pytest.mark.parametrize(("target", "count"), [("images", 3000), ("captions", 400), ("json", 1500)])
def test_fuzz(target: str, count: int) -> None:
    check(fuzz(target, 0, count), target, count)


@pytest.mark.long
@pytest.mark.parametrize("target", OUTCOMES)
@pytest.mark.parametrize("part", range(4))
def test_fuzz_long(target: str, part: int) -> None:
    count = {"images": 100_000, "captions": 5_000, "json": 50_000}[target]
    check(fuzz(target, 1_000_000 * (part + 1), count), target, count)


def check(report: dict[str, Any], target: str, count: int) -> None:
    outcomes = report["outcomes"]
    # Random bytes are rarely the signature of a format that is not supported.
    assert set(outcomes) - {"unsupported-format"} == OUTCOMES[target]
    assert sum(outcomes.values()) == count
    assert outcomes["accepted"] > count / 20
    assert report["slowest"][0] < MAX_SECONDS, f"input with seed {report['slowest'][1]}"
    assert report["peak_mib"] < MAX_MIB
