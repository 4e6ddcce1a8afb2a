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
_DTYPES = {name: dtype for dtype, name in _DTYPE_NAMES.items()}


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


class TensorFile:
    """Reads ranges of the tensors of a safetensors file into memory of the caller.

    The library maps files instead, and its tensors become invalid if the file is removed.
    """

    def __init__(self, path: Path) -> None:
        """Read the header.

        Raises:
            CheckpointError: It is not a safetensors file.
        """
        self._path, self._descriptor = path, -1
        try:
            size = int.from_bytes(self._bytes(0, 8), "little")
            header = json.loads(self._bytes(8, size))
            self._tensors = {
                name: (_DTYPES[entry["dtype"]], 8 + size + entry["data_offsets"][0])
                for name, entry in header.items()
                if name != "__metadata__"
            }
        except (ValueError, KeyError, TypeError, OverflowError, MemoryError) as error:
            raise CheckpointError(f"{path} is not a safetensors file") from error

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def dtype(self, name: str) -> torch.dtype:
        """Type of the values of a tensor.

        Raises:
            CheckpointError: There is no such tensor.
        """
        if name not in self._tensors:
            raise CheckpointError(f"{self._path} has no {name!r}")
        return self._tensors[name][0]

    def read_into(self, out: Tensor, name: str, first: int) -> None:
        """Read values of a tensor, from index `first` on, into a contiguous tensor on CPU."""
        assert out.dtype == self.dtype(name)
        begin = self._tensors[name][1] + first * out.element_size()
        self._read(_raw_bytes(out), begin)

    def close(self) -> None:
        """Close the file; it is opened again when needed."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __del__(self) -> None:
        self.close()

    def _bytes(self, begin: int, count: int) -> bytearray:
        data = bytearray(count)
        self._read(memoryview(data), begin)
        return data

    def _read(self, buffer: memoryview, begin: int) -> None:
        if self._descriptor < 0:
            self._descriptor = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        while buffer:
            count = os.preadv(self._descriptor, [buffer[:_CHUNK_BYTES]], begin)
            if not count:
                raise CheckpointError(f"{self._path} ends at byte {begin:,}, inside of a tensor")
            buffer, begin = buffer[count:], begin + count


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
