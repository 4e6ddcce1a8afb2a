"""Fixtures for all tests, implemented in tests/support."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

PROCESS_TESTS = ("tests/distributed/", "tests/e2e/")
"""Tests that start several processes or servers, which would compete for the cores."""

# Imported by the fixtures that need them: importing torch takes seconds, and most tests need none.
if TYPE_CHECKING:
    from tests.support.s3_server import S3Server
    from tests.support.shape_dataset import ShapeDataset
    from tests.support.slurm import SlurmCluster


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """The scheduler of `pytest -n N`: which tests run in the same worker, one after another.

    The tests of `tests/distributed`, which use all cores, those of `tests/e2e`, which mostly wait,
    and otherwise the tests of a file, because they share fixtures.
    """
    from xdist.scheduler import LoadScopeScheduling

    class FileScheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return next((folder for folder in PROCESS_TESTS if file.startswith(folder)), file)

    # In the order of collection: the tests that start processes take longest and must start first.
    config.option.loadscopereorder = False
    return FileScheduling(config, log)


@pytest.fixture(scope="session")
def slurm_cluster() -> Iterator[SlurmCluster]:
    """A SLURM cluster with two nodes; skips the test if it cannot be started."""
    from tests.support import slurm

    if reason := slurm.why_unavailable():
        pytest.skip(reason)
    with slurm.slurm_cluster(num_nodes=2) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """An S3 server with the bucket `shards`; each test must use its own prefix."""
    from tests.support import s3_server

    with s3_server.s3_server() as server:
        yield server


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> ShapeDataset:
    """64 images of colored shapes with captions in four shards, and a tokenizer; shared, so
    read-only."""
    from tests.support.shape_dataset import make_shape_dataset

    return make_shape_dataset(tmp_path_factory.mktemp("shapes"))
