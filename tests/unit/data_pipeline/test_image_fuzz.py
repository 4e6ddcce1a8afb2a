"""Damaged and random samples, thousands of them, in a process of their own: none may crash, hang or
fill the memory, and each must become an item or one counted problem."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.support.launch import ROOT, clean_environment

REASONS = {
    "images": {"good", "bad-image"},
    "captions": {"good", "empty", "bad-text", "caption-too-long"},
    "json": {"good", "empty", "bad-json", "bad-text"},
}
SECONDS = 3.0
"""Most CPU time that one input may take; the slowest took a third."""
MIB = 1024


def fuzz(what: str, first: int, rounds: int) -> dict[str, Any]:
    """Run the rounds; see `tests/support/fuzz_content.py`."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.fuzz_content", what, str(first), str(rounds)],
        cwd=ROOT,
        env=clean_environment(),
        text=True,
        capture_output=True,
        timeout=280,
        errors="replace",
    )
    # A crash of a decoder shows as a negative status, anything unforeseen as 1 with a traceback.
    assert done.returncode == 0, f"status {done.returncode}: {done.stderr[-3000:]}"
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize(("what", "rounds"), [("images", 3000), ("captions", 400), ("json", 1500)])
def test_anything_becomes_an_item_or_one_counted_problem(what: str, rounds: int) -> None:
    check(fuzz(what, 0, rounds), what, rounds)


@pytest.mark.long
@pytest.mark.parametrize("what", REASONS)
@pytest.mark.parametrize("part", range(4))
def test_anything_at_length(what: str, part: int) -> None:
    rounds = {"images": 100_000, "captions": 5_000, "json": 50_000}[what]
    check(fuzz(what, 1_000_000 * (part + 1), rounds), what, rounds)


def check(found: dict[str, Any], what: str, rounds: int) -> None:
    outcomes = found["outcomes"]
    assert set(outcomes) == REASONS[what]
    assert sum(outcomes.values()) == rounds
    assert outcomes["good"] > rounds / 20
    assert found["slowest"][0] < SECONDS, f"round {found['slowest'][1]}"
    assert found["most_mib"] < MIB
