"""Errors of a store without credentials, and of one that does not respond."""

from __future__ import annotations

import socket

import pytest

from tests.support.bad_input import Workspace, assert_contains, one_error
from tests.support.ports import free_ports

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]

KEYS = {"AWS_ACCESS_KEY_ID": "AKIANOBODY", "AWS_SECRET_ACCESS_KEY": "very-secret-words"}


def test_no_credentials(workspace: Workspace) -> None:
    (port,) = free_ports(1)
    # The test machine may have a cloud's metadata service at the default address.
    env = dict.fromkeys(KEYS) | {"AWS_METADATA_ENDPOINT": f"http://127.0.0.1:{port}"}
    settings = "data.train=[s3://bucket/pairs] data.timeout_seconds=5 data.shard_seconds=4"
    result = workspace.train(*settings.split(), env=env)
    assert_contains(
        one_error(result),
        "cannot read s3://bucket/pairs/manifest.json",
        "no credentials",
        "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    )
    assert result.seconds < 30


@pytest.mark.parametrize("accepts_connections", [False, True])
def test_no_response(workspace: Workspace, accepts_connections: bool) -> None:
    settings = "data.train=[s3://bucket/pairs] data.timeout_seconds=2 data.shard_seconds=1"
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if accepts_connections:
            listener.listen()
        env = KEYS | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{listener.getsockname()[1]}"}
        result = workspace.train(*settings.split(), env=env)

    assert_contains(
        one_error(result),
        "cannot read s3://bucket/pairs/manifest.json",
        "did not answer in time" if accepts_connections else "cannot be reached",
        "network",
    )
    assert result.seconds < 30
    assert "very-secret" not in result.output and "AKIANOBODY" not in result.output
