"""Training state that is saved in checkpoints."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_pipeline.order.state import LoaderState
from pretrain.checkpoint import CheckpointError, find_latest, read_meta
from pretrain.config.paths import CHECKPOINTS_FOLDER
from pretrain.parallel.communicator import Communicator

STATE_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class TrainState:
    """Progress of a run between two optimizer steps."""

    version: int = STATE_VERSION
    step: int = 0
    """Number of completed optimizer steps."""
    samples_seen: int = 0
    """Valid pairs trained on, over all ranks; the loader's position also counts skipped ones."""
    seconds: float = 0.0
    """Time until this step, including building the components, summed over all restarts."""
    loader: LoaderState
    """Position in the data."""

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        return asdict(self) | {"loader": self.loader.to_json()}

    @staticmethod
    def from_json(value: dict[str, Any]) -> TrainState:
        """Parse the result of `to_json`.

        Raises:
            CheckpointError: It has another version.
        """
        if value.get("version") != STATE_VERSION:
            raise CheckpointError(
                f"the checkpoint's training state has version {value.get('version')!r}, but this "
                f"program reads version {STATE_VERSION}; resume with the program that wrote it"
            )
        return TrainState(
            step=value["step"],
            samples_seen=value["samples_seen"],
            seconds=value["seconds"],
            loader=LoaderState.from_json(value["loader"]),
        )


def saved_loader_state(out: Path, communicator: Communicator) -> LoaderState:
    """Loader state of the checkpoint from which a run would resume; a new one without checkpoints.
    Collective.

    Which checkpoint is intact is only known when it is loaded; this one may be newer.
    """
    value = None
    if communicator.rank == 0:
        try:
            path = find_latest(out / CHECKPOINTS_FOLDER)
            value = read_meta(path).state["train"]["loader"] if path else None
        except CheckpointError:
            value = None  # loading it reports what is wrong
    value = communicator.broadcast_json(value)
    return LoaderState() if value is None else LoaderState.from_json(value)
