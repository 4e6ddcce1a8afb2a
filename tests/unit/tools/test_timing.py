"""Timing of candidates, CPU time of process trees, tables, and report files."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from functools import partial

import pytest

from tools import process_stats, timing
from tools.measurements import HEADER, Measurement, not_measured
from tools.timing import Clock, Quartiles


def test_order_of_candidates_alternates() -> None:
    calls: list[str] = []
    candidates = {name: partial(calls.append, name) for name in "ab"}
    clock = Clock(lambda: float(len(calls)), 0.0001, 0.001)
    seconds = timing.interleave(candidates, repeats=4, warmup=2, clock=clock)
    assert "".join(calls) == "abba" * 3
    assert seconds == {"a": [1.0] * 4, "b": [1.0] * 4}


def test_stopwatch_replaces_the_cpu_clock() -> None:
    calls: list[str] = []
    seconds = timing.interleave(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")},
        repeats=2,
        warmup=1,
        stopwatch=lambda work: (work(), 7.0)[1],  # type: ignore[func-returns-value]
    )
    assert seconds == {"a": [7.0, 7.0], "b": [7.0, 7.0]} and "".join(calls) == "baabba"


def test_background_work_is_counted() -> None:
    # Idle, then the work; two readings later the background work is done.
    readings = iter([0.0, 0.0, 5.0, 6.0, 7.0, 7.0])
    clock = Clock(lambda: next(readings), 0.001, 0.001)
    assert timing.cpu_seconds(lambda: None, clock) == 7.0


def test_ratio_is_taken_within_rounds() -> None:
    # The machine was half as fast in the second round; the ratio is still 3.
    assert timing.ratio([3.0, 6.0, 3.0], [1.0, 2.0, 1.0]) == Quartiles(3.0, 3.0, 3.0)
    values = [5.0, 1.0, 4.0, 2.0, 3.0]
    assert list(Quartiles.of(values)) == statistics.quantiles(values, n=4, method="inclusive")


def test_process_tree_counts_live_and_ended_children() -> None:
    burn = "import time\nwhile time.process_time() < 0.3: pass\n"
    before = process_stats.tree_cpu_seconds()
    subprocess.run([sys.executable, "-c", burn], check=True)
    after_first = process_stats.tree_cpu_seconds()
    assert after_first - before >= 0.25

    with subprocess.Popen(
        [sys.executable, "-c", burn + "print(1, flush=True)\ninput()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()
        assert process_stats.process_tree()[0] == os.getpid()
        assert child.pid in process_stats.process_tree()
        assert process_stats.tree_cpu_seconds() - after_first >= 0.25
        child.communicate(b"\n")
    assert child.pid not in process_stats.process_tree()


@pytest.mark.parametrize(
    ("median", "less_is_better", "verdict"),
    [
        (2.5, False, "goal"),
        (1.5, False, "floor"),
        (1.0, False, "MISSED"),
        (0.5, True, "goal"),
        (3.0, True, "MISSED"),
    ],
)
def test_verdict(median: float, less_is_better: bool, verdict: str) -> None:
    floor, goal = (2.0, 1.0) if less_is_better else (1.3, 2.0)
    measurement = Measurement(
        name="x",
        value=Quartiles(median, median, median),
        floor=floor,
        goal=goal,
        less_is_better=less_is_better,
    )
    assert measurement.verdict() == verdict
    assert verdict in measurement.row()


def test_not_measured_keeps_the_reason() -> None:
    measurement = not_measured("ours / peer", "not installed")
    assert measurement.verdict() == "not measured"
    assert measurement.to_json()["value"] is None
    assert measurement.row()[-1] == "not installed" and len(measurement.row()) == len(HEADER)
