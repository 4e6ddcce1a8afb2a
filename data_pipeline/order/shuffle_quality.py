"""Shuffle quality of a source, measured on one epoch of its order.

Shards are shuffled as a whole and samples only within a window of shards, so samples that are
adjacent in a shard (often from one crawl, one class, one camera) stay closer to each other than in
a perfect shuffle. The same metrics are computed for the plan and for a random permutation of the
same samples:

- **distance**: positions between samples that are adjacent in storage, as a fraction of the epoch;
  1/3 on average in a perfect shuffle (also its 5 % and 50 % quantiles);
- **unevenness**: how unevenly a shard's samples are spread over the epoch: the Kolmogorov-Smirnov
  distance between their positions and a uniform distribution, mean over shards; 0 is uniform, 1 is
  all at one position;
- **same shard**: fraction of samples followed by a sample of the same shard;
- **shards per batch**: effective number of shards (1 / sum of squared fractions) in a batch;
- **class counts**: variance of a class's count in a batch if the samples had been sorted by class
  before they were written to shards (the worst case).

The first two concern the whole epoch: for a large dataset they are computed on a smaller one with
the same fraction of shards in a window. The others are computed on batches of the actual plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from data_pipeline.common.seeds import rng
from data_pipeline.common.tables import format_table
from data_pipeline.order.plan import Plan

MAX_SAMPLES = 1 << 20
"""Larger datasets are measured in part; see the module docstring."""
_MAX_SHARDS = 2048
_NUM_CLASSES = 64
_MAX_SHARDS_FOR_UNEVENNESS = 256


@dataclass(frozen=True, kw_only=True)
class ShuffleQuality:
    """Metrics of one order; see the module docstring."""

    distance_mean: float
    distance_5_percent: float
    distance_median: float
    unevenness: float
    same_shard: float
    shards_per_batch: float
    class_variance: float


LABELS = {
    "distance_mean": "distance of samples adjacent in storage, mean (fraction of epoch)",
    "distance_5_percent": "  5 % quantile",
    "distance_median": "  median",
    "unevenness": "unevenness of a shard over the epoch (0 to 1)",
    "same_shard": "fraction followed by a sample of the same shard",
    "shards_per_batch": "shards per batch, effective number",
    "class_variance": "variance of class counts in a batch, samples sorted by class",
}


def shuffle_quality(
    shard_sizes: Sequence[int] | np.ndarray, seed: int, shuffle_window: int, batch_size: int
) -> tuple[ShuffleQuality, ShuffleQuality]:
    """Measure the first epoch of a plan, and a perfect shuffle of the same samples.

    Args:
        shard_sizes: Samples of each shard.
        seed: Seed of the plan.
        shuffle_window: Number of shards whose samples are shuffled together.
        batch_size: Number of samples of this source in a global batch.

    Returns:
        The metrics of the plan, and of the perfect shuffle.
    """
    sizes = np.asarray(shard_sizes, dtype=np.int64)
    sizes = sizes[sizes > 0]
    total = int(sizes.sum())
    batch_size = max(1, min(batch_size, total))

    small, small_window = _reduced_sizes(sizes, shuffle_window)
    epoch = _sample_ids(Plan(small, seed, small_window), small, 0, int(small.sum()))
    starts = _batch_starts(total, batch_size, shuffle_window * int(sizes.mean()))
    plan = Plan(sizes, seed, shuffle_window)
    batches = np.stack([_sample_ids(plan, sizes, start, batch_size) for start in starts])

    generator = rng(seed, "perfect shuffle")
    if total <= MAX_SAMPLES:
        perfect = generator.permutation(total)
        perfect_batches = np.stack([perfect[start : start + batch_size] for start in starts])
    else:
        # With so many samples, duplicates are rare.
        perfect_batches = generator.integers(0, total, size=batches.shape)
    perfect_epoch = generator.permutation(len(epoch))

    return (
        measure(epoch, small, batches, sizes),
        measure(perfect_epoch, small, perfect_batches, sizes),
    )


def measure(
    epoch: np.ndarray,
    epoch_shard_sizes: np.ndarray,
    batches: np.ndarray,
    batch_shard_sizes: np.ndarray,
) -> ShuffleQuality:
    """Compute the metrics of one order.

    Args:
        epoch: int64 `[samples]`, a permutation: the sample at each position. Samples are numbered
            consecutively over the shards.
        epoch_shard_sizes: Samples of each shard of `epoch`.
        batches: int64 `[batches, batch_size]`: the samples of some batches.
        batch_shard_sizes: Samples of each shard of `batches`.
    """
    total = len(epoch)
    position_of = np.empty(total, dtype=np.int64)
    position_of[epoch] = np.arange(total)

    shard_of = np.repeat(np.arange(len(epoch_shard_sizes)), epoch_shard_sizes)
    adjacent = shard_of[:-1] == shard_of[1:]
    distances = np.array([1 / 3])
    if adjacent.any():
        distances = np.abs(np.diff(position_of))[adjacent] / total

    shards = np.searchsorted(np.cumsum(batch_shard_sizes), batches, side="right")
    same_shard = 0.0
    if shards.shape[1] > 1:
        same_shard = float(np.mean(shards[:, 1:] == shards[:, :-1]))

    return ShuffleQuality(
        distance_mean=float(distances.mean()),
        distance_5_percent=float(np.quantile(distances, 0.05)),
        distance_median=float(np.median(distances)),
        unevenness=_unevenness(position_of, epoch_shard_sizes),
        same_shard=same_shard,
        shards_per_batch=float(np.mean([_effective_number(row) for row in shards])),
        class_variance=_class_variance(batches, int(np.sum(batch_shard_sizes))),
    )


def format_quality_table(measured: ShuffleQuality, perfect: ShuffleQuality) -> str:
    """A table of both, side by side."""
    values, perfect_values = asdict(measured), asdict(perfect)
    rows = [
        (label, f"{values[name]:.4g}", f"{perfect_values[name]:.4g}")
        for name, label in LABELS.items()
    ]
    return format_table(["", "this order", "perfect"], rows, rule=False)


def _reduced_sizes(sizes: np.ndarray, window: int) -> tuple[np.ndarray, int]:
    """Shard sizes and window of a dataset of at most about `MAX_SAMPLES` samples, with the same
    fraction of its shards in a window."""
    if sizes.sum() <= MAX_SAMPLES:
        return sizes, window

    count = min(len(sizes), _MAX_SHARDS)
    selected = sizes[np.linspace(0, len(sizes) - 1, count).astype(np.int64)]
    scale = min(1.0, MAX_SAMPLES / selected.sum())
    reduced = np.maximum(1, np.round(selected * scale).astype(np.int64))
    return reduced, max(1, round(window * count / len(sizes)))


def _batch_starts(total: int, batch_size: int, window_samples: int) -> list[int]:
    """First positions of the batches to measure: all of them, or some over the whole epoch."""
    count = total // batch_size
    if total > MAX_SAMPLES:
        # Each batch costs the shuffling of a window, so fewer are measured if windows are large.
        count = min(count, max(8, min(256, (1 << 25) // max(1, window_samples))))
        return [int(start) for start in np.linspace(0, total - batch_size, count)]
    return [batch_size * index for index in range(count)]


def _sample_ids(plan: Plan, sizes: np.ndarray, first: int, count: int) -> np.ndarray:
    """Samples of a plan, numbered consecutively over the shards."""
    refs = plan.samples(first, count)
    starts = np.cumsum(sizes) - sizes
    ids: np.ndarray = starts[[ref.shard for ref in refs]]
    return ids + np.array([ref.sample for ref in refs], dtype=np.int64)


def _effective_number(shards: np.ndarray) -> float:
    counts = np.unique(shards, return_counts=True)[1]
    return float(counts.sum() ** 2 / np.square(counts, dtype=np.float64).sum())


def _unevenness(position_of: np.ndarray, sizes: np.ndarray) -> float:
    """Kolmogorov-Smirnov distance of a shard's positions from the uniform distribution, mean over
    up to 256 shards."""
    starts, total = np.cumsum(sizes) - sizes, len(position_of)
    num_shards = min(_MAX_SHARDS_FOR_UNEVENNESS, len(sizes))
    distances = []
    for shard in np.linspace(0, len(sizes) - 1, num_shards).astype(np.int64):
        count = int(sizes[shard])
        positions = position_of[starts[shard] : starts[shard] + count]
        quantiles = np.sort(positions + 0.5) / total
        steps = np.arange(count + 1) / count
        distances.append(max(np.max(steps[1:] - quantiles), np.max(quantiles - steps[:-1])))
    return float(np.mean(distances))


def _class_variance(batches: np.ndarray, total: int) -> float:
    """Mean squared deviation of a class's count in a batch from its expected value, over batches
    and classes."""
    num_classes = min(_NUM_CLASSES, total)
    classes = batches * num_classes // total
    flat = classes + np.arange(len(classes))[:, None] * num_classes
    counts = np.bincount(flat.ravel(), minlength=len(classes) * num_classes)
    counts_per_batch = counts.reshape(-1, num_classes)
    return float(np.square(counts_per_batch - batches.shape[1] / num_classes).mean())
