"""`vlmoe data`: the commands of the data pipeline, and `order`, which also reads a run file."""

from __future__ import annotations

from data_pipeline.commands import add_all
from data_pipeline.common.commands import Subparsers, add_group
from pretrain.cli import order


def add(subparsers: Subparsers) -> None:
    """Add the group and its commands."""
    commands = add_group(subparsers, "data", summary="create, check and inspect shards")
    add_all(commands)
    order.add(commands)
