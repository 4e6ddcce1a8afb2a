"""`vlmoe train`: one call on every rank."""

from __future__ import annotations

import re
from pathlib import Path

from data_pipeline.common.errors import LostRankError
from pretrain.config.schema import RunConfig
from pretrain.parallel.environment import is_lost_rank, stop_process_group
from pretrain.train.build import build
from pretrain.train.loop import train


def train_command(run: RunConfig, out: Path) -> None:
    """Train the run in its folder, going on from its newest checkpoint. Collective.

    Raises:
        VlmError: A problem of the run, the data, the disk or the cluster.
    """
    try:
        parts = build(run, out)
        train(parts)
        parts.engine.barrier()
    except RuntimeError as error:
        if not is_lost_rank(error):
            raise
        # Without the place in gloo's source and its advice.
        reason = re.sub(
            r"^\[[^]]*\] *|\. This is typically.*", "", str(error).strip().splitlines()[0]
        )
        raise LostRankError(
            f"the ranks cannot talk to each other any more ({reason}). Most often "
            f"another rank ended, or took longer than parallel.timeout_seconds "
            f"({run.parallel.timeout_seconds:g} s): its own last words, above or in {out / 'logs'}, say why. "
            f"Start the same command again to go on from the last checkpoint"
        ) from error
    stop_process_group()
