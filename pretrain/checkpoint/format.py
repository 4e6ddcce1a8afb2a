"""Checkpoint format: folder layout, file names and `meta.json`.

    checkpoints/
      latest                         text: name of the folder to resume from
      step-00000100/
        model-00000.safetensors      weights, one file per rank that saves some
        optimizer-00000.safetensors  optimizer shard, one file per rank
        rank-00000.json              random states of that rank
        meta.json                    written last: step, layout, size and hash of each file, state

Expert weights are named `NAME@first:last`, the half-open range of global expert indices in that
file; `weights.load_model_weights` concatenates them. Tensors are safetensors and everything else is
JSON, so reading a checkpoint never executes code from it.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pretrain.checkpoint.files import FileRecord
from pretrain.parallel.errors import CheckpointError

VERSION = 3
LATEST = "latest"
META = "meta.json"
WRITING_PREFIX = ".writing-"
REPLACED_PREFIX = ".replaced-"
WEIGHTS_PREFIX = "model-"

_STEP_NAME = re.compile(r"step-(\d{8,})")
_FILE_NAME = re.compile(r"(model|optimizer)-\d{5,}\.safetensors|rank-\d{5,}\.json")


class CorruptCheckpointError(CheckpointError):
    """A checkpoint is missing, incomplete or modified; an older one may still be intact."""


@dataclass(frozen=True, kw_only=True)
class Meta:
    """The contents of meta.json."""

    step: int
    """Number of completed optimizer steps."""
    layout: dict[str, Any]
    """Layout of the run that wrote it: world size, expert parallelism, ZeRO stage, precision."""
    files: dict[str, FileRecord]
    """Every other file of the folder."""
    state: dict[str, Any]
    """State of the training loop: loader position, schedule, tokenizer fingerprint."""
    version: int = VERSION
    """Version of this format."""

    def to_json(self) -> dict[str, Any]:
        """A JSON object, with a SHA-256 of its own contents."""
        contents = asdict(self) | {
            "files": {name: record._asdict() for name, record in self.files.items()}
        }
        return contents | {"sha256": _hash_of_json(contents)}

    @classmethod
    def from_json(cls, value: Any, *, path: Path) -> Meta:
        """Parse and verify the result of `to_json`.

        Args:
            value: Parsed JSON.
            path: Where it was read, for error messages.

        Raises:
            CorruptCheckpointError: Something is missing or modified.
            CheckpointError: It has an unsupported format version.
        """
        if not isinstance(value, dict):
            raise CorruptCheckpointError(f"{path} is not a JSON object; the checkpoint is corrupt")
        if value.get("version") != VERSION:
            raise CheckpointError(
                f"{path} has format version {value.get('version')!r}, but this program reads "
                f"version {VERSION}; use the program version that wrote it"
            )
        contents = {name: field for name, field in value.items() if name != "sha256"}
        if value.get("sha256") != _hash_of_json(contents):
            raise CorruptCheckpointError(
                f"{path} was modified after it was written: its own hash does not match"
            )
        files = {name: FileRecord(**record) for name, record in contents.pop("files").items()}
        invalid = [name for name in files if not _FILE_NAME.fullmatch(name)]
        if invalid:
            raise CorruptCheckpointError(
                f"{path} lists {invalid[0]!r}, which is not the name of a checkpoint file"
            )
        return cls(files=files, **contents)


def step_name(step: int) -> str:
    """Folder name of a step's checkpoint."""
    return f"step-{step:08d}"


def parse_step(name: str) -> int | None:
    """Step of a checkpoint folder's name; None for other names."""
    match = _STEP_NAME.fullmatch(name)
    return int(match[1]) if match else None


def model_file(rank: int) -> str:
    return f"{WEIGHTS_PREFIX}{rank:05d}.safetensors"


def optimizer_file(rank: int) -> str:
    return f"optimizer-{rank:05d}.safetensors"


def rank_file(rank: int) -> str:
    return f"rank-{rank:05d}.json"


def _hash_of_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, allow_nan=False).encode()).hexdigest()
