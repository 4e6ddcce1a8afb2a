"""CPU time and memory of processes, read from /proc."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple


class _CpuTicks(NamedTuple):
    """Clock ticks of one process; `children_*` count descendants that ended and were waited for."""

    user: int
    system: int
    children_user: int
    children_system: int


def tree_cpu_seconds(pid: int | None = None) -> float:
    """CPU seconds of a process and its descendants, including those that ended and were waited for.

    `resource.getrusage` counts children only after they have ended. Resolution: one clock tick
    (10 ms).
    """
    ticks_per_second = os.sysconf("SC_CLK_TCK")
    total = sum(sum(ticks) for ticks in _tree_ticks(pid or os.getpid()).values())
    return total / ticks_per_second


def process_tree(pid: int | None = None) -> list[int]:
    """IDs of a process and its live descendants; the process itself is the first."""
    return list(_tree_ticks(pid or os.getpid()))


def peak_bytes(pid: int) -> int:
    """Peak resident set size of a process, bytes."""
    return _status_bytes(pid, "VmHWM")


def resident_bytes(pid: int) -> int:
    """Current resident set size of a process, bytes."""
    return _status_bytes(pid, "VmRSS")


def _tree_ticks(root: int) -> dict[int, _CpuTicks]:
    """CPU ticks of `root` and its live descendants, by process ID; `root` is the first key."""
    parents: dict[int, int] = {}
    ticks: dict[int, _CpuTicks] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            # The command name in parentheses may contain spaces: parse the fields after it.
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue  # the process has ended
        parents[int(entry.name)] = int(fields[1])
        ticks[int(entry.name)] = _CpuTicks(*map(int, fields[11:15]))

    tree = {root} if root in ticks else set[int]()
    while children := {pid for pid, parent in parents.items() if parent in tree} - tree:
        tree |= children
    return {pid: ticks[pid] for pid in sorted(tree, key=lambda pid: (pid != root, pid))}


def _status_bytes(pid: int, field: str) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) << 10
    raise ValueError(f"/proc/{pid}/status has no {field}")
