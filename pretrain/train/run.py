"""`vlmoe train`: one call on every rank."""

from __future__ import annotations

from pathlib import Path

from pretrain.config.schema import RunConfig
from pretrain.parallel.environment import stop_process_group
from pretrain.train.build import build
from pretrain.train.loop import train


def train_command(run: RunConfig, out: Path) -> None:
    """Train the run in its folder, going on from its newest checkpoint. Collective.

    Raises:
        VlmError: A problem of the run, the data, the disk or the cluster.
    """
    parts = build(run, out)
    train(parts)
    parts.engine.barrier()
    stop_process_group()
