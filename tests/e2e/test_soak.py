"""Memory, files and threads of a loader with two workers must not grow over a million samples."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.bench_loader import soak
from tools.bench_loader.workloads import prepare


@pytest.mark.long
@pytest.mark.e2e
@pytest.mark.timeout(900)
def test_resources_do_not_grow(tmp_path: Path) -> None:
    result = soak.run(prepare(soak.TINY, tmp_path), 1_000_000)
    assert result.samples >= 1_000_000
    assert result.problems == 0
    assert len(result.snapshots) >= 1 + soak.WORKERS, "the workers were not measured"
    growth_mib = {pid: result.growth_per_100k(pid, "resident") / 2**20 for pid in result.snapshots}
    assert max(growth_mib.values()) < soak.LIMIT_MIB, f"MiB per 100,000 samples: {growth_mib}"
    # Prefetched batches use some of each; a leak of one per epoch would be 40 per 100,000 samples.
    for resource in ("files", "threads", "shm_mappings"):
        assert result.max_growth(resource) < 5, (resource, result.snapshots)
    assert result.leaked_shm == ()
