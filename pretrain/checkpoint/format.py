"""What a checkpoint folder looks like, and the one way its files are written.

    checkpoints/
      latest                         text: the name of the folder to go on from
      step-00000100/
        model-00000.safetensors      weights, one file per rank that holds some
        optimizer-00000.safetensors  optimizer shard, one file per rank
        rank-00000.json              random states of that rank
        meta.json                    written last: step, layout, size and hash of every other file, state

Weights of experts are named `NAME@first:last`, the half-open range of global expert numbers in that
file; `reader.load_model_weights` joins them. Tensors are safetensors and all else is JSON: reading
a checkpoint never runs code from it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from data_pipeline.common.errors import CheckpointError

VERSION = 1
LATEST = "latest"
META = "meta.json"
WRITING_PREFIX = ".writing-"
REPLACED_PREFIX = ".replaced-"
WEIGHTS_PREFIX = "model-"

_STEP_NAME = re.compile(r"step-(\d{8,})")
_FILE_NAME = re.compile(r"(model|optimizer)-\d{5,}\.safetensors|rank-\d{5,}\.json")
_PIECE_BYTES = 16 * 2**20

# Names of the safetensors format, https://github.com/huggingface/safetensors#format
_DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class LayoutLike(Protocol):
    """How a run lies over ranks; equal JSON means that shards fit one to one."""

    def to_json(self) -> dict[str, Any]: ...


class CheckpointEngine(Protocol):
    """What saving and loading need from a training engine
    (`pretrain.parallel.engine.TrainEngine`)."""

    @property
    def rank(self) -> int: ...
    @property
    def world_size(self) -> int: ...
    @property
    def layout(self) -> LayoutLike: ...

    def model_tensors(self) -> Mapping[str, Tensor]:
        """Collective: the weights that this rank writes; empty on ranks that write none."""

    def optimizer_tensors(self) -> Mapping[str, Tensor]:
        """Collective: this rank's optimizer shard."""

    def load_model_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take weights from the names of *all* ranks; reading a name reads its tensor from disk."""

    def load_optimizer_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take back what `optimizer_tensors` gave on this rank."""

    def gather_json(self, value: Any) -> list[Any]:
        """Collective: the values of all ranks in rank order, on every rank."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint is missing, incomplete or changed; an older one may still be whole."""


class FileRecord(NamedTuple):
    """What a file must be to count as unchanged."""

    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Meta:
    """The contents of meta.json."""

    step: int
    """Optimizer steps done."""
    layout: dict[str, Any]
    """World, expert parallelism, ZeRO stage and precision it was written under."""
    files: dict[str, FileRecord]
    """Every other file of the folder."""
    state: dict[str, Any]
    """What the training loop wants back: loader position, schedule, tokenizer fingerprint, run."""
    version: int = VERSION
    """Of this format."""

    def to_json(self) -> dict[str, Any]:
        """Plain values, with a hash over themselves so that a changed number is noticed."""
        plain = asdict(self) | {
            "files": {name: record._asdict() for name, record in self.files.items()}
        }
        return plain | {"sha256": _hash_of_json(plain)}

    @classmethod
    def from_json(cls, value: Any, *, where: Path) -> Meta:
        """Check and take apart what `to_json` gave.

        Raises:
            DamagedCheckpointError: Something is missing or changed.
            CheckpointError: It was written by a version that this one does not know.
        """
        if not isinstance(value, dict):
            raise DamagedCheckpointError(
                f"{where} does not hold a JSON object; the checkpoint is damaged"
            )
        if value.get("version") != VERSION:
            raise CheckpointError(
                f"{where} has format version {value.get('version')!r}, but this program reads version "
                f"{VERSION}; use the program version that wrote it"
            )
        plain = {name: part for name, part in value.items() if name != "sha256"}
        if value.get("sha256") != _hash_of_json(plain):
            raise DamagedCheckpointError(
                f"{where} was changed after it was written; its own hash differs"
            )
        files = {name: FileRecord(**record) for name, record in plain.pop("files").items()}
        strange = [name for name in files if not _FILE_NAME.fullmatch(name)]
        if strange:
            raise DamagedCheckpointError(
                f"{where} lists {strange[0]!r}, which no checkpoint file is called"
            )
        return cls(files=files, **plain)


def step_name(step: int) -> str:
    """Folder name of a step's checkpoint."""
    return f"step-{step:08d}"


def step_of(name: str) -> int | None:
    """Step of a checkpoint folder's name, or None if it is called otherwise."""
    match = _STEP_NAME.fullmatch(name)
    return int(match[1]) if match else None


def model_file(rank: int) -> str:
    return f"{WEIGHTS_PREFIX}{rank:05d}.safetensors"


def optimizer_file(rank: int) -> str:
    return f"optimizer-{rank:05d}.safetensors"


def rank_file(rank: int) -> str:
    return f"rank-{rank:05d}.json"


def write_file(path: Path, pieces: Iterable[bytes | memoryview]) -> FileRecord:
    """Write a new file down to the disk, hashing on the way.

    Raises:
        OSError: As the system gave it; the file may be left incomplete.
    """
    digest, total_bytes = hashlib.sha256(), 0
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        for piece in pieces:
            rest = memoryview(piece)
            digest.update(rest)
            total_bytes += len(rest)
            while rest:
                rest = rest[os.write(descriptor, rest[:_PIECE_BYTES]) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return FileRecord(total_bytes, digest.hexdigest())


def write_json(path: Path, value: Any) -> FileRecord:
    """Write a JSON file; NaN and infinity are refused because other readers of JSON refuse them."""
    return write_file(path, [json.dumps(value, indent=1, sort_keys=True, allow_nan=False).encode()])


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> FileRecord:
    """Write a safetensors file piece by piece.

    The library's own writer wants either a whole second copy in memory (`save`) or hides the
    system's error numbers and gives no hash (`save_file`); the format is a small JSON header and
    the raw values one after the other, so it is written here and read by the library.
    """
    # Wide types first keeps every tensor aligned to its own size, which the library does too.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {}
    end = 0
    for name in names:
        tensor = tensors[name]
        if tensor.dtype not in _DTYPE_NAMES:
            raise CheckpointError(f"{name} has type {tensor.dtype}, which checkpoints do not store")
        first, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [first, end],
        }
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    values = (_raw(tensors[name]) for name in names)
    return write_file(path, _chain(len(head).to_bytes(8, "little") + head, values))


def sync_folder(folder: Path) -> None:
    """Make names that were added to or removed from a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def hash_file(path: Path) -> FileRecord:
    """Size and hash of a file as it is now."""
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256")
        return FileRecord(stream.tell(), digest.hexdigest())


def _chain(first: bytes, rest: Iterable[memoryview]) -> Iterable[bytes | memoryview]:
    yield first
    yield from rest


def _raw(tensor: Tensor) -> memoryview:
    """The bytes of a tensor in row-major order; copies only what is not in memory that way."""
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]


def _hash_of_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, allow_nan=False).encode()).hexdigest()
