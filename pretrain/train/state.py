"""What survives a restart, as a value."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from data_pipeline.common.errors import CheckpointError
from data_pipeline.order.state import LoaderState

STATE_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class TrainState:
    """Where a run stands between two optimizer steps."""

    version: int = STATE_VERSION
    step: int = 0
    """Optimizer steps done."""
    samples_seen: int = 0
    """Valid pairs trained on, over all ranks; the loader's position counts bad ones too."""
    seconds: float = 0.0
    """Time spent training, over all restarts, from building the parts to the step."""
    loader: LoaderState
    """Where the data goes on."""

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        return asdict(self) | {"loader": self.loader.to_json()}

    @staticmethod
    def from_json(value: dict[str, Any]) -> TrainState:
        """Read what `to_json` gave.

        Raises:
            CheckpointError: Another version wrote it.
        """
        if value.get("version") != STATE_VERSION:
            raise CheckpointError(
                f"the checkpoint's training state has version {value.get('version')!r}, "
                f"this program reads version {STATE_VERSION}; resume with the program that wrote it"
            )
        return TrainState(
            step=value["step"],
            samples_seen=value["samples_seen"],
            seconds=value["seconds"],
            loader=LoaderState.from_json(value["loader"]),
        )
