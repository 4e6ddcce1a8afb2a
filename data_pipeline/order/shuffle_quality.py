"""How close the shuffle of a source comes to a perfect one, measured on an epoch of its order.

Shards are shuffled whole and samples only within a window of shards, so samples that lie side by
side in a shard (often of one crawl, one class, one camera) come nearer to each other than in a
perfect shuffle. How much nearer, and whether a batch notices, is measured by the same code on the
plan and on a random permutation of the same samples:

- **distance**: places between samples that are neighbors in storage, as a share of the epoch; 1/3 on
  average in a perfect shuffle (and its 5 % and 50 % quantiles);
- **unevenness**: how a shard's samples lie over the epoch: the Kolmogorov-Smirnov distance between their
  places and even ones, mean over shards; 0 is even, 1 all in one place;
- **same shard**: how often a sample is followed by one of its own shard;
- **shards a batch**: effective number (1 / sum of squared shares) in a batch;
- **class counts**: if samples had been sorted by class before shards were made (the worst case), the
  variance of a class's count in a batch.

The first two concern the epoch as a whole: a large set is measured on a small one with the same
share of shards in a window. The others are measured on batches of the real plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from data_pipeline.common.seeds import rng
from data_pipeline.order.plan import Plan

MOST_SAMPLES = 1 << 20
"""A larger set is measured in part: see above."""
_SMALL_SHARDS = 2048
_CLASSES = 64


@dataclass(frozen=True, kw_only=True)
class ShuffleQuality:
    """What was measured on one order."""

    distance_mean: float
    distance_5_percent: float
    distance_median: float
    unevenness: float
    same_shard: float
    shards_per_batch: float
    class_variance: float


LABELS = {
    "distance_mean": "distance of neighbors in storage, mean (share of the epoch)",
    "distance_5_percent": "  of the nearest 5 %, at most",
    "distance_median": "  median",
    "unevenness": "unevenness of a shard over the epoch (0 to 1)",
    "same_shard": "followed by a sample of the same shard",
    "shards_per_batch": "shards in a batch, effective number",
    "class_variance": "variance of class counts in a batch, were samples sorted by class",
}


def shuffle_quality(
    shard_sizes: Sequence[int] | np.ndarray, seed: int, shuffle_window: int, batch: int
) -> tuple[ShuffleQuality, ShuffleQuality]:
    """Measure the first epoch of a plan, and a perfect shuffle of the same samples.

    Args:
        shard_sizes: Samples of each shard.
        seed: Of the plan.
        shuffle_window: Shards whose samples are shuffled together.
        batch: Samples of a global batch that come from this source.
    """
    sizes = np.asarray(shard_sizes, dtype=np.int64)
    sizes = sizes[sizes > 0]
    total = int(sizes.sum())
    batch = max(1, min(batch, total))
    small, small_window = _small(sizes, shuffle_window)
    epoch = _numbers(Plan(small, seed, small_window), small, 0, int(small.sum()))
    firsts = _batch_starts(total, batch, shuffle_window * int(sizes.mean()))
    plan = Plan(sizes, seed, shuffle_window)
    batches = np.stack([_numbers(plan, sizes, first, batch) for first in firsts])

    draw = rng(seed, "perfect shuffle")
    if total <= MOST_SAMPLES:
        perfect = draw.permutation(total)
        perfect_batches = np.stack([perfect[first : first + batch] for first in firsts])
    else:
        # Of so many samples hardly any is drawn twice.
        perfect_batches = draw.integers(0, total, size=batches.shape)
    perfect_epoch = draw.permutation(len(epoch))
    return measure(epoch, small, batches, sizes), measure(
        perfect_epoch, small, perfect_batches, sizes
    )


def measure(
    epoch: np.ndarray, epoch_sizes: np.ndarray, batches: np.ndarray, batch_sizes: np.ndarray
) -> ShuffleQuality:
    """Measure one order.

    Args:
        epoch: int64 `[samples]`, a permutation: which sample comes at each place; samples are
        numbered
            shard after shard.
        epoch_sizes: Samples of each of its shards.
        batches: int64 `[batches, batch]`: the samples of some batches.
        batch_sizes: Samples of each shard that those are from.
    """
    total = len(epoch)
    place_of = np.empty(total, dtype=np.int64)
    place_of[epoch] = np.arange(total)
    shard_of = np.repeat(np.arange(len(epoch_sizes)), epoch_sizes)
    neighbors = shard_of[:-1] == shard_of[1:]
    distances = (
        np.abs(np.diff(place_of))[neighbors] / total if neighbors.any() else np.array([1 / 3])
    )
    shards = np.searchsorted(np.cumsum(batch_sizes), batches, side="right")
    return ShuffleQuality(
        distance_mean=float(distances.mean()),
        distance_5_percent=float(np.quantile(distances, 0.05)),
        distance_median=float(np.median(distances)),
        unevenness=_unevenness(place_of, epoch_sizes),
        same_shard=float(np.mean(shards[:, 1:] == shards[:, :-1])) if shards.shape[1] > 1 else 0.0,
        shards_per_batch=float(np.mean([_effective(row) for row in shards])),
        class_variance=_class_variance(batches, int(np.sum(batch_sizes))),
    )


def quality_table(found: ShuffleQuality, perfect: ShuffleQuality) -> str:
    """Both side by side, for a person."""
    lines = [f"{'':<66} {'this order':>11} {'perfect':>11}"]
    for name, label in LABELS.items():
        lines.append(f"{label:<66} {asdict(found)[name]:>11.4g} {asdict(perfect)[name]:>11.4g}")
    return "\n".join(lines)


def _small(sizes: np.ndarray, window: int) -> tuple[np.ndarray, int]:
    """A set of at most about `MOST_SAMPLES` samples with the same share of its shards in a
    window."""
    if sizes.sum() <= MOST_SAMPLES:
        return sizes, window
    count = min(len(sizes), _SMALL_SHARDS)
    chosen = sizes[np.linspace(0, len(sizes) - 1, count).astype(np.int64)]
    shrunk = np.maximum(
        1, np.round(chosen * min(1.0, MOST_SAMPLES / chosen.sum())).astype(np.int64)
    )
    return shrunk, max(1, round(window * count / len(sizes)))


def _batch_starts(total: int, batch: int, window_samples: int) -> list[int]:
    """First places of the batches to look at: all of them, or some over the whole epoch."""
    count = total // batch
    if total > MOST_SAMPLES:
        # Each costs the shuffling of a window, so there are fewer of large ones.
        count = min(count, max(8, min(256, (1 << 25) // max(1, window_samples))))
        return [int(first) for first in np.linspace(0, total - batch, count)]
    return [batch * number for number in range(count)]


def _numbers(plan: Plan, sizes: np.ndarray, first: int, count: int) -> np.ndarray:
    """Samples of a plan, numbered shard after shard."""
    refs = plan.samples(first, count)
    starts = np.cumsum(sizes) - sizes
    found: np.ndarray = starts[[ref.shard for ref in refs]] + np.array(
        [ref.sample for ref in refs], dtype=np.int64
    )
    return found


def _effective(shards: np.ndarray) -> float:
    counts = np.unique(shards, return_counts=True)[1]
    return float(counts.sum() ** 2 / np.square(counts, dtype=np.float64).sum())


def _unevenness(place_of: np.ndarray, sizes: np.ndarray) -> float:
    """Mean Kolmogorov-Smirnov distance of up to 256 shards' places from the uniform
    distribution."""
    starts, total = np.cumsum(sizes) - sizes, len(place_of)
    found = []
    for shard in np.linspace(0, len(sizes) - 1, min(256, len(sizes))).astype(np.int64):
        count = int(sizes[shard])
        places = np.sort(place_of[starts[shard] : starts[shard] + count] + 0.5) / total
        steps = np.arange(count + 1) / count
        found.append(max(np.max(steps[1:] - places), np.max(places - steps[:-1])))
    return float(np.mean(found))


def _class_variance(batches: np.ndarray, total: int) -> float:
    """Mean squared distance of a class's count in a batch from what it should be, over batches and
    classes."""
    number = min(_CLASSES, total)
    classes = batches * number // total
    flat = classes + np.arange(len(classes))[:, None] * number
    counts = np.bincount(flat.ravel(), minlength=len(classes) * number).reshape(-1, number)
    return float(np.square(counts - batches.shape[1] / number).mean())
