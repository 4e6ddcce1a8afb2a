"""Model weights of a checkpoint: lazily by name, or with the experts of all ranks concatenated."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from pretrain.checkpoint.format import WEIGHTS_PREFIX, CorruptCheckpointError, Meta
from pretrain.checkpoint.verify import check_hashes, check_sizes, read_meta
from pretrain.parallel.tensor_names import slice_name, split_name


class TensorFiles(Mapping[str, Tensor]):
    """The tensors of several safetensors files as one mapping; each access reads from disk."""

    def __init__(self, paths: list[Path]) -> None:
        self._path_of: dict[str, Path] = {}
        for path in paths:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - safe_open is not a mapping
                    if name in self._path_of:
                        raise CorruptCheckpointError(
                            f"{name} is in both {self._path_of[name]} and {path}"
                        )
                    self._path_of[name] = path

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self._path_of[name], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._path_of)

    def __len__(self) -> int:
        return len(self._path_of)


def load_model_weights(path: Path, *, verify: bool = True) -> dict[str, Tensor]:
    """All weights of a checkpoint for one process, for any layout of the run that saved them.

    Args:
        path: A checkpoint folder.
        verify: Verify the hashes of the weight files first.

    Returns:
        Tensors by full name. Slices `NAME@first:last` of experts are concatenated to one tensor
        `NAME`, `[experts, ...]` in the order of their global indices.

    Raises:
        CorruptCheckpointError: A file is missing or modified, or experts are missing or duplicated.
    """
    meta = read_meta(path)
    check_sizes(path, meta)
    files = weight_files(path, meta)
    if verify:
        check_hashes(path, meta, [file.name for file in files])
    tensors = TensorFiles(files)
    weights: dict[str, Tensor] = {}
    slices: dict[str, list[tuple[int, int]]] = {}
    for name in tensors:
        base, span = split_name(name)
        if span is None:
            weights[name] = tensors[name]
        else:
            slices.setdefault(base, []).append(span)
    for base, spans in slices.items():
        weights[base] = _concatenate_experts(base, sorted(spans), tensors, meta)
    return weights


def weight_files(path: Path, meta: Meta) -> list[Path]:
    """The weight files of all ranks, in rank order."""
    return [path / name for name in sorted(meta.files) if name.startswith(WEIGHTS_PREFIX)]


def _concatenate_experts(
    base: str, spans: list[tuple[int, int]], tensors: TensorFiles, meta: Meta
) -> Tensor:
    parts = [tensors[slice_name(base, first, last - first)] for first, last in spans]
    end = 0
    for (first, last), part in zip(spans, parts, strict=True):
        if first != end or part.shape[0] != last - first:
            raise CorruptCheckpointError(
                f"experts of {base}: expected contiguous slices from 0, but the checkpoint has "
                f"{spans} with {[part.shape[0] for part in parts]} experts"
            )
        end = last
    num_experts = meta.layout.get("num_experts", end)
    if end != num_experts:
        raise CorruptCheckpointError(
            f"experts of {base}: expected {num_experts} experts, but the checkpoint only has "
            f"slices {spans}"
        )
    full = parts[0].new_empty((end, *parts[0].shape[1:]))
    for (first, last), part in zip(spans, parts, strict=True):
        full[first:last] = part
    return full
