"""`vlmoe train`: the function that every rank calls."""

from __future__ import annotations

import re
from pathlib import Path

from pretrain.config.schema import RunConfig
from pretrain.parallel.environment import is_connection_error, stop_process_group
from pretrain.parallel.errors import LostRankError
from pretrain.train.build import build
from pretrain.train.loop import train


def train_command(run: RunConfig, out: Path) -> None:
    """Train a run in its folder, resuming from its newest checkpoint. Collective.

    Raises:
        VlmError: A problem of the run, the data, the file system or the cluster.
    """
    try:
        components = build(run, out)
        train(components)
        components.communicator.barrier()
    except RuntimeError as error:
        if not is_connection_error(error):
            raise
        # Removes gloo's source location and generic advice from the message.
        reason = re.sub(
            r"^\[[^]]*\] *|\. This is typically.*", "", str(error).strip().splitlines()[0]
        )
        raise LostRankError(
            f"lost the connection to another rank ({reason}). Usually that rank failed, or "
            f"exceeded parallel.timeout_seconds ({run.parallel.timeout_seconds:g} s); see its last "
            f"messages, above or in {out / 'logs'}. Rerun the same command to resume from the last "
            f"checkpoint"
        ) from error
    stop_process_group()
