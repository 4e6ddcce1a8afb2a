"""Our way from a picture's bytes to the model's pixels, alone: for other loaders, and as the limit
of all."""

from __future__ import annotations

import numpy as np

from data_pipeline.content.headers import read_header
from data_pipeline.content.images import decode_pixels
from data_pipeline.content.transforms import planes, render
from data_pipeline.content.views import GEOMETRY_DRAWS, least_pixels, reduced_view, train_view
from tools.bench_loader.workloads import SEED, Workload


class Decoder:
    """Decodes and transforms as the loader does, but draws from one generator for all samples."""

    def __init__(self, workload: Workload) -> None:
        self._size, self._augment = workload.image_size, workload.augment
        self._rng = np.random.default_rng(SEED) if workload.augments else None

    def __call__(self, data: bytes, out: np.ndarray | None = None) -> np.ndarray:
        """uint8 `[3, size, size]` of one picture file, in `out` if that is given."""
        draws = (
            [0.0] * GEOMETRY_DRAWS
            if self._rng is None
            else self._rng.random(GEOMETRY_DRAWS).tolist()
        )
        header = read_header(data)
        view = train_view(header.width, header.height, self._augment, draws)
        enough = least_pixels(view, header.width, header.height, self._size)
        pixels, reduced = decode_pixels(data, header, enough)
        if reduced != 1:
            view = reduced_view(view, reduced, header.width, header.height)
        return planes(render(pixels, view, self._size), out)
