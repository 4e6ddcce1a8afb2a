"""Fixtures that several folders of tests use; the machinery is in tests/support."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

# The fixtures import what they need: most tests need none of it, and torch alone takes seconds.
if TYPE_CHECKING:
    from tests.support.s3_server import S3Server
    from tests.support.shards import Shapes
    from tests.support.slurm import SlurmCluster


@pytest.fixture(scope="session")
def slurm_cluster() -> Iterator[SlurmCluster]:
    """A real SLURM with two nodes; the test is skipped where none can be started."""
    from tests.support import slurm

    if reason := slurm.why_unavailable():
        pytest.skip(reason)
    with slurm.slurm_cluster(num_nodes=2) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """A real S3 server with the empty bucket `shards`; use a prefix of your own in it."""
    from tests.support import s3_server

    with s3_server.s3_server() as server:
        yield server


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Shapes:
    """64 colored shapes with captions in four shards, and a tokenizer; read-only, as all tests
    share it."""
    from tests.support.shards import make_shapes

    return make_shapes(tmp_path_factory.mktemp("shapes"))
