"""Checkpoint format: folder layout, file names and `meta.json`.

    checkpoints/
      latest                         text: name of the folder to resume from
      step-00000100/
        state-00000.safetensors      what rank 0 saves of weights, moments and routing biases
        meta.json                    written last: parameters, what each file has of them, size and
                                     hash of each file, state of the training loop

A checkpoint does not depend on the layout that wrote it. A rank saves ranges of the values of
parameters, which are named after the parameter of the whole model; `NAME#start/weight` are the
values of NAME from index `start` on, float32, and `NAME#start/exp_avg` their moments. All files
together have every value once. Tensors are safetensors and everything else is JSON, so reading a
checkpoint never executes code from it.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pretrain.checkpoint.files import FileRecord
from pretrain.parallel.errors import CheckpointError

VERSION = 4
LATEST = "latest"
META = "meta.json"
WRITING_PREFIX = ".writing-"
REPLACED_PREFIX = ".replaced-"

_STEP_NAME = re.compile(r"step-(\d{8,})")
_FILE_NAME = re.compile(r"state-\d{5,}\.safetensors")


class CorruptCheckpointError(CheckpointError):
    """A checkpoint is missing, incomplete or modified; an older one may still be intact."""


class SavedParameter(NamedTuple):
    """A parameter or buffer of the whole model, with the experts of all ranks."""

    shape: tuple[int, ...]
    steps: int
    """Adam's step count; 0 if no moments are saved."""


@dataclass(frozen=True, kw_only=True)
class Meta:
    """The contents of meta.json."""

    step: int
    """Number of completed optimizer steps."""
    layout: dict[str, Any]
    """Layout of the run that wrote it, for information: world size, expert parallelism, ZeRO stage,
    precision."""
    files: dict[str, FileRecord]
    """Every other file of the folder."""
    parameters: dict[str, SavedParameter]
    """All parameters and buffers of the model, in the order of `fragments`."""
    fragments: dict[str, list[tuple[int, int, int]]]
    """Of each file: index of a parameter, index of the first value, number of values."""
    state: dict[str, Any]
    """State of the training loop: loader position, schedule, tokenizer fingerprint."""
    version: int = VERSION
    """Version of this format."""

    def to_json(self) -> dict[str, Any]:
        """A JSON object, with a SHA-256 of its own contents."""
        contents: dict[str, Any] = {
            "step": self.step,
            "layout": self.layout,
            "files": {name: record._asdict() for name, record in self.files.items()},
            # A list, because the order counts and JSON objects are sorted for hashing.
            "parameters": [[name, *parameter] for name, parameter in self.parameters.items()],
            "fragments": self.fragments,
            "state": self.state,
            "version": self.version,
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
        parameters = {
            name: SavedParameter(tuple(shape), steps)
            for name, shape, steps in contents.pop("parameters")
        }
        fragments = {
            file: [(index, start, count) for index, start, count in ranges]
            for file, ranges in contents.pop("fragments").items()
        }
        return cls(files=files, parameters=parameters, fragments=fragments, **contents)


def step_name(step: int) -> str:
    """Folder name of a step's checkpoint."""
    return f"step-{step:08d}"


def parse_step(name: str) -> int | None:
    """Step of a checkpoint folder's name; None for other names."""
    match = _STEP_NAME.fullmatch(name)
    return int(match[1]) if match else None


def state_file(rank: int) -> str:
    """Name of the file that a rank writes."""
    return f"state-{rank:05d}.safetensors"


def tensor_name(name: str, start: int, kind: str) -> str:
    """Name in a file of the values of a parameter from `start` on."""
    return f"{name}#{start}/{kind}"


def _hash_of_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, allow_nan=False).encode()).hexdigest()
