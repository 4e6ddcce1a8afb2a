"""Low-level file I/O of checkpoints: durable writes with SHA-256, JSON and safetensors."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pretrain.parallel.errors import CheckpointError

_CHUNK_BYTES = 16 * 2**20

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


class FileRecord(NamedTuple):
    """Size and hash by which a file is verified."""

    bytes: int
    sha256: str


def write_file(path: Path, chunks: Iterable[bytes | memoryview]) -> FileRecord:
    """Create a file, hash it while writing, and fsync it.

    Raises:
        OSError: As raised by the system; the file may be left incomplete.
    """
    digest, total_bytes = hashlib.sha256(), 0
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        for chunk in chunks:
            remaining = memoryview(chunk)
            digest.update(remaining)
            total_bytes += len(remaining)
            while remaining:
                remaining = remaining[os.write(descriptor, remaining[:_CHUNK_BYTES]) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return FileRecord(total_bytes, digest.hexdigest())


def write_json(path: Path, value: Any) -> FileRecord:
    """Write a JSON file. NaN and infinity are rejected: they are not valid JSON."""
    return write_file(path, [json.dumps(value, indent=1, sort_keys=True, allow_nan=False).encode()])


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> FileRecord:
    """Write a safetensors file, one tensor after the other.

    `safetensors.torch.save` needs a second copy of all tensors in memory; `save_file` hides the
    system's error numbers and returns no hash. The format is a JSON header followed by the raw
    values.

    Raises:
        CheckpointError: A tensor has a dtype that the format does not support.
        OSError: As in `write_file`.
    """
    # Larger dtypes first, so that every tensor is aligned to its dtype, as the library does.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {}
    end = 0
    for name in names:
        tensor = tensors[name]
        if tensor.dtype not in _DTYPE_NAMES:
            raise CheckpointError(
                f"{name} has dtype {tensor.dtype}, which checkpoints cannot store"
            )
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    header_bytes = json.dumps(header).encode()
    header_bytes += b" " * (-len(header_bytes) % 8)
    header_bytes = len(header_bytes).to_bytes(8, "little") + header_bytes
    values = (_raw_bytes(tensors[name]) for name in names)
    return write_file(path, itertools.chain([header_bytes], values))


def fsync_folder(folder: Path) -> None:
    """Fsync a folder: makes created, renamed and removed entries durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def hash_file(path: Path) -> FileRecord:
    """Size and hash of a file on disk."""
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256")
        return FileRecord(stream.tell(), digest.hexdigest())


def _raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor in row-major order; copies only if it is not on CPU and contiguous."""
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]
