"""Reads any range of the values in a checkpoint, whichever files have them."""

from __future__ import annotations

import bisect
import math
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from data_pipeline.common.tables import counted
from pretrain.checkpoint.files import TensorFile
from pretrain.checkpoint.format import CorruptCheckpointError, Meta, tensor_name
from pretrain.checkpoint.verify import check_hashes, check_sizes, read_meta
from pretrain.parallel.errors import CheckpointError
from pretrain.parallel.state_fragments import VALUE, WEIGHT

_MAX_OPEN_FILES = 256
"""Files that are open at the same time; the headers of all are kept."""


class _Range(NamedTuple):
    start: int
    end: int
    file: str


class SavedState:
    """The tensors of one checkpoint; implements `StateReader`. Values are read when needed."""

    def __init__(self, folder: Path, meta: Meta) -> None:
        """Prepare for reading; no file is opened.

        Raises:
            CorruptCheckpointError: The files do not have every value of each parameter once.
        """
        self._folder, self._meta = folder, meta
        self._ranges: dict[str, list[_Range]] = {name: [] for name in meta.parameters}
        names = list(meta.parameters)
        for file, fragments in meta.fragments.items():
            for index, start, count in fragments:
                self._ranges[names[index]].append(_Range(start, start + count, file))
        for name, ranges in self._ranges.items():
            ranges.sort()
            self._check_complete(name, ranges)
        self._files: dict[str, TensorFile] = {}
        self._open: OrderedDict[str, TensorFile] = OrderedDict()

    def read(self, name: str, kind: str, start: int, count: int) -> Tensor:
        """See `StateReader.read`."""
        ranges = self._ranges.get(name)
        if ranges is None:
            raise CheckpointError(f"checkpoint {self._folder} has no {name!r}")
        index = bisect.bisect_right(ranges, start, key=lambda item: item.start) - 1
        values: Tensor | None = None
        end, read = start + count, 0
        for item in ranges[max(0, index) :]:
            first, last = max(start, item.start), min(end, item.end)
            if item.start >= end:
                break
            if first < last:
                file, tensor = self._file(item.file), tensor_name(name, item.start, kind)
                if values is None:
                    values = torch.empty(count, dtype=file.dtype(tensor))
                part = values[first - start : last - start]
                file.read_into(part, tensor, first - item.start)
                read += len(part)
        if read != count:
            raise CheckpointError(
                f"checkpoint {self._folder} has {read} of the values {start} to {end} of {name!r}"
            )
        return torch.empty(0) if values is None else values

    def steps(self, name: str) -> int:
        """See `StateReader.steps`."""
        parameter = self._meta.parameters.get(name)
        return parameter.steps if parameter else 0

    def check_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """See `StateReader.check_shapes`."""
        saved = {name: tuple(parameter.shape) for name, parameter in self._meta.parameters.items()}
        differing = [
            f"{name!r} has shape {_shape(saved.get(name))} in the checkpoint, and "
            f"{_shape(shapes.get(name))} in this run's model"
            for name in sorted(saved.keys() | shapes.keys())
            if saved.get(name) != shapes.get(name)
        ]
        if differing:
            others = f", and {len(differing) - 1:,} more differ" if len(differing) > 1 else ""
            raise CheckpointError(
                f"checkpoint {self._folder} is of another model: {differing[0]}{others}. Set the "
                f"model, moe and balance sections as in config.yaml of the run folder "
                f"(balance.bias and balance.bias_per_modality determine the biases), or use "
                f"another run folder"
            )

    def whole(self, name: str) -> Tensor:
        """A whole parameter or buffer."""
        shape = self._meta.parameters[name].shape
        kind = WEIGHT if self._has(name, WEIGHT) else VALUE
        return self.read(name, kind, 0, math.prod(shape)).view(shape)

    def _has(self, name: str, kind: str) -> bool:
        first = self._ranges[name][0]
        return tensor_name(name, first.start, kind) in self._file(first.file)

    def _file(self, name: str) -> TensorFile:
        if name not in self._files:
            self._files[name] = TensorFile(self._folder / name)
        file = self._files[name]
        self._open[name] = file
        self._open.move_to_end(name)
        if len(self._open) > _MAX_OPEN_FILES:
            self._open.popitem(last=False)[1].close()
        return file

    def _check_complete(self, name: str, ranges: list[_Range]) -> None:
        numel = math.prod(self._meta.parameters[name].shape)
        ends = [0, *(item.end for item in ranges)]
        if [item.start for item in ranges] != ends[:-1] or ends[-1] != numel:
            raise CorruptCheckpointError(
                f"checkpoint {self._folder} does not have every value of {name!r} once: it has "
                f"{counted(numel, 'value')}, and the files have the ranges "
                f"{[(item.start, item.end) for item in ranges[:5]]}"
            )


def load_model_weights(path: Path, *, verify: bool = True) -> dict[str, Tensor]:
    """All weights and buffers of a checkpoint for one process, by name, float32.

    Args:
        path: A checkpoint folder.
        verify: Verify the hashes of the files first.

    Raises:
        CorruptCheckpointError: A file is missing or modified, or values are missing.
    """
    meta = read_meta(path)
    check_sizes(path, meta)
    if verify:
        check_hashes(path, meta, list(meta.files))
    state = SavedState(path, meta)
    return {name: state.whole(name) for name in meta.parameters}


def _shape(shape: tuple[int, ...] | None) -> str:
    return "none" if shape is None else str(list(shape))
