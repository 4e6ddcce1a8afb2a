"""`vlmoe data`: the data pipeline's own commands, and those that need a run."""

from __future__ import annotations

from data_pipeline.commands import add_all
from data_pipeline.common.commands import Subparsers, add_group
from pretrain.cli import order


def add(subparsers: Subparsers) -> None:
    """Add the group and its commands."""
    commands = add_group(subparsers, "data", summary="make, check and look at shards")
    add_all(commands)
    order.add(commands)
