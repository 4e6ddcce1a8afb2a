"""The weights of a checkpoint: by name from all its files, or joined for one process."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from pretrain.checkpoint.format import WEIGHTS_PREFIX, DamagedCheckpointError, Meta
from pretrain.checkpoint.verify import check_hashes, check_sizes, read_meta


class TensorFiles(Mapping[str, Tensor]):
    """The tensors of several safetensors files under one roof; a tensor is read when it is asked
    for."""

    def __init__(self, paths: list[Path]) -> None:
        self._home: dict[str, Path] = {}
        for path in paths:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - safe_open is no mapping
                    if name in self._home:
                        raise DamagedCheckpointError(
                            f"{name} is in both {self._home[name]} and {path}"
                        )
                    self._home[name] = path

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self._home[name], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._home)

    def __len__(self) -> int:
        return len(self._home)


def load_model_weights(path: Path, *, verify: bool = True) -> dict[str, Tensor]:
    """All weights of a checkpoint for one process, whatever layout wrote them.

    Args:
        path: A checkpoint folder.
        verify: Hash the weight files first.

    Returns:
        Tensors by full name; experts that lay in slices `NAME@first:last` are one tensor `NAME`
        again, `[experts, ...]` in the order of their global numbers.

    Raises:
        DamagedCheckpointError: A file is missing or changed, or experts are missing or there twice.
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
        base, at, span = name.rpartition("@")
        if at:
            first, last = (int(number) for number in span.split(":"))
            slices.setdefault(base, []).append((first, last))
        else:
            weights[name] = tensors[name]
    for base, spans in slices.items():
        weights[base] = _join_experts(base, sorted(spans), tensors, meta)
    return weights


def weight_files(path: Path, meta: Meta) -> list[Path]:
    """The weight files of all ranks, in rank order."""
    return [path / name for name in sorted(meta.files) if name.startswith(WEIGHTS_PREFIX)]


def _join_experts(
    base: str, spans: list[tuple[int, int]], tensors: TensorFiles, meta: Meta
) -> Tensor:
    parts = [tensors[f"{base}@{first}:{last}"] for first, last in spans]
    expected = 0
    for (first, last), part in zip(spans, parts, strict=True):
        if first != expected or part.shape[0] != last - first:
            raise DamagedCheckpointError(
                f"experts of {base}: expected slices one after the other from 0, found {spans} "
                f"with {[part.shape[0] for part in parts]} experts in them"
            )
        expected = last
    experts = meta.layout.get("num_experts", expected)
    if expected != experts:
        raise DamagedCheckpointError(
            f"experts of {base}: {experts} were trained, found slices {spans} only"
        )
    whole = parts[0].new_empty((expected, *parts[0].shape[1:]))
    for (first, last), part in zip(spans, parts, strict=True):
        whole[first:last] = part
    return whole
