"""A million samples through two workers: nothing may grow."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.bench_loader import soak
from tools.bench_loader.workloads import prepare


@pytest.mark.long
@pytest.mark.e2e
@pytest.mark.timeout(900)
def test_a_million_samples_leave_memory_files_and_threads_as_they_were(tmp_path: Path) -> None:
    seen = soak.run(prepare(soak.TINY, tmp_path), 1_000_000)
    assert seen.samples >= 1_000_000
    assert seen.problems == 0
    assert len(seen.looks) >= 1 + soak.WORKERS, "the workers were not looked at"
    resident = {pid: seen.per_100k(pid, "resident") / 2**20 for pid in seen.looks}
    assert max(resident.values()) < soak.LIMIT_MIB, (
        f"MiB per 100,000 samples by process: {resident}"
    )
    # Batches on the way hold some; one left behind an epoch would be 40 in 100,000 samples.
    for count in ("files", "threads", "shared"):
        assert seen.steepest(count) < 5, (count, seen.looks)
    assert seen.left_in_shm == ()
