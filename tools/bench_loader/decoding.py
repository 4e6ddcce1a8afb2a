"""The loader's decode and transform of one image, without the loader.

Other loaders use it, so that only the data path differs; alone it is the upper bound for all of
them.
"""

from __future__ import annotations

import numpy as np

from data_pipeline.content.image_header import read_header
from data_pipeline.content.images import decode_pixels
from data_pipeline.content.transforms import hwc_to_chw, render
from data_pipeline.content.views import (
    NUM_GEOMETRY_UNIFORMS,
    min_decode_size,
    random_view,
    scale_view,
)
from tools.bench_loader.workloads import SEED, Workload


class Decoder:
    """Decodes and transforms like the loader, but with one random generator for all samples."""

    def __init__(self, workload: Workload) -> None:
        self._size, self._augment = workload.image_size, workload.augment
        self._rng = np.random.default_rng(SEED) if workload.augments else None

    def __call__(self, data: bytes, out: np.ndarray | None = None) -> np.ndarray:
        """Decode an image file to uint8 `[3, size, size]`, into `out` if given."""
        if self._rng is None:
            uniforms = [0.0] * NUM_GEOMETRY_UNIFORMS
        else:
            uniforms = self._rng.random(NUM_GEOMETRY_UNIFORMS).tolist()

        header = read_header(data)
        view = random_view(header.width, header.height, self._augment, uniforms)
        min_size = min_decode_size(view, header.width, header.height, self._size)
        pixels, reduction = decode_pixels(data, header, min_size)
        if reduction != 1:
            view = scale_view(view, reduction, header.width, header.height)
        return hwc_to_chw(render(pixels, view, self._size), out)
