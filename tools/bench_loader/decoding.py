"""The loader's decode and transform of one image, without the loader.

Other loaders use it, so that only the data path differs; alone it is the upper bound for all of
them.
"""

from __future__ import annotations

import numpy as np

from data_pipeline.content.image import NUM_GEOMETRY_UNIFORMS, read_header, train_image
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
        return train_image(data, read_header(data), self._size, self._augment, uniforms, out=out)
