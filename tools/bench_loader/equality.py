"""Compares the samples that two loaders deliver, before anything is timed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import NamedTuple

import numpy as np

from tools.bench_loader.peers import AnyBatch
from tools.bench_loader.workloads import Workload

MAX_GRAY_LEVELS = 6.0
"""Largest mean absolute pixel difference between images decoded by different libraries."""


class Sample(NamedTuple):
    """One row of a batch."""

    pixels: bytes
    token_ids: list[int]
    """Without padding."""


def read_one_pass(stream: Iterator[AnyBatch], workload: Workload) -> dict[str, Sample]:
    """Read every sample of a stream once; returns them by key."""
    samples: dict[str, Sample] = {}
    # A shuffled stream may deliver samples of the next pass before the last of this one.
    for batch in islice(stream, 4 * -(-workload.samples // workload.batch)):
        rows = zip(batch.keys, batch.images.numpy(), batch.text_ids.tolist(), strict=True)
        for key, image, ids in rows:
            samples[key] = Sample(image.tobytes(), [token for token in ids if token])
        if len(samples) == workload.samples:
            return samples
    raise AssertionError(
        f"the stream delivered {len(samples)} of {workload.samples} samples in four passes"
    )


def check_equal(
    name: str, actual: Mapping[str, Sample], expected: Mapping[str, Sample], workload: Workload
) -> None:
    """Check that two loaders deliver the same samples.

    Keys and token ids must be equal, and so must pixels, except with random augmentation (only
    sizes are compared) and with Pillow's decoder (see `MAX_GRAY_LEVELS`).

    Raises:
        AssertionError: They differ.
    """
    assert actual.keys() == expected.keys(), f"{name}: sample keys differ"
    for key, (pixels, ids) in actual.items():
        expected_pixels, expected_ids = expected[key]
        assert ids == expected_ids, f"{name}: token ids of sample {key} differ"
        assert len(pixels) == len(expected_pixels), f"{name}: image size of sample {key} differs"
        if workload.augments:
            continue
        if name.endswith("Pillow"):
            difference = _mean_difference(pixels, expected_pixels)
            assert difference < MAX_GRAY_LEVELS, (
                f"{name}: sample {key} differs by {difference:.1f} gray levels"
            )
        else:
            assert pixels == expected_pixels, f"{name}: pixels of sample {key} differ"


def _mean_difference(first: bytes, second: bytes) -> float:
    """Mean absolute difference in gray levels."""
    a, b = (np.frombuffer(data, np.uint8).astype(np.int16) for data in (first, second))
    return float(np.abs(a - b).mean())
