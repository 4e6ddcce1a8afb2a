"""Expert load and coactivation as matrices of ratios: 1 is the mean load, or the rate of chance.

Pure functions of counts. Shapes: L MoE layers, M modalities (0 image, 1 text), E experts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from pretrain.config.experts import MoEConfig
from pretrain.moe.tokens import MODALITIES

Array = np.ndarray[Any, Any]

BISECTION_STEPS = 60
"""Enough to reach the resolution of float64."""


class Grid(NamedTuple):
    """A matrix of ratios to draw."""

    title: str
    ratio_RC: Array
    """float64 `[rows, columns]`, at least 0; NaN for cells without a value."""
    rows: tuple[str, ...]
    columns: tuple[str, ...]


def load_grids(load_LME: Array, blocks: Sequence[int], moe: MoEConfig) -> list[Grid]:
    """Load of each expert relative to the mean, one grid per modality.

    Args:
        load_LME: Number of assigned tokens.
        blocks: Block index of each layer.
        moe: Defines the experts of each modality; the others have no value.
    """
    grids = []
    for column, modality in enumerate(MODALITIES):
        ratio_LE = load_over_mean(load_LME[:, column], moe.pool(column))
        title = f"{modality} tokens: load relative to the mean"
        grids.append(Grid(title, ratio_LE, _layers(blocks), _experts(ratio_LE.shape[1])))
    return grids


def load_over_mean(load_LE: Array, pool: slice) -> Array:
    """Load divided by its mean over the experts of a pool; NaN for other experts and no tokens."""
    ratio_LE = np.full(load_LE.shape, np.nan)
    load_in_pool = load_LE[:, pool].astype(np.float64)
    mean_L1 = load_in_pool.mean(axis=1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio_LE[:, pool] = np.where(mean_L1 > 0, load_in_pool / mean_L1, np.nan)
    return ratio_LE


def coactivation_grids(
    coactivation_LEE: Array, blocks: Sequence[int], moe: MoEConfig, suffix: str = ""
) -> list[Grid]:
    """Coactivation of pairs of experts relative to chance, one grid per layer.

    Args:
        coactivation_LEE: Tokens assigned to both experts.
        blocks: Block index of each layer.
        moe: Defines the pools.
        suffix: Appended to the name of the layer in titles.
    """
    grids = []
    for name, coactivation_EE in zip(_layers(blocks), coactivation_LEE, strict=True):
        experts = _experts(len(coactivation_EE))
        lift_EE = coactivation_lift(coactivation_EE, moe.pool_slices())
        grids.append(
            Grid(f"{name}{suffix}: coactivation relative to chance", lift_EE, experts, experts)
        )
    return grids


def coactivation_lift(coactivation_EE: Array, pools: Sequence[slice]) -> Array:
    """Counts divided by `expected_coactivation` of each pool, float64 `[experts, experts]`.

    NaN on the diagonal, for experts of different pools (no token is assigned to both) and where
    less than one token is expected.
    """
    lift_EE = np.full(coactivation_EE.shape, np.nan)
    for pool in pools:
        counts_EE = coactivation_EE[pool, pool]
        expected_EE = expected_coactivation(counts_EE)
        known_EE = expected_EE >= 1
        lift_EE[pool, pool][known_EE] = counts_EE[known_EE] / expected_EE[known_EE]
    return lift_EE


def expected_coactivation(coactivation_EE: Array) -> Array:
    """Expected tokens of each pair of experts if the assignments of a token were independent.

    A token is never assigned to the same expert twice, so the product of the experts' fractions
    would overestimate every pair. This estimate keeps the row sums, has zeros on the diagonal, and
    is otherwise a product a_i a_j (quasi-independence).

    With S the sum of all a, a_i (S - a_i) = w_i, so a_i is the smaller root of a quadratic; for the
    expert with the largest w it may be the larger root. S is the only unknown, found by bisection.
    Iterative proportional fitting would need thousands of iterations if nearly every token is
    assigned to the same expert.

    Args:
        coactivation_EE: Tokens by pair of experts, symmetric; the diagonal is ignored.

    Returns:
        float64 `[experts, experts]`.
    """
    off_diagonal_EE = 1 - np.eye(len(coactivation_EE))
    row_sum_E = (coactivation_EE * off_diagonal_EE).sum(axis=1)
    if not row_sum_E.any():
        return np.zeros_like(off_diagonal_EE)
    largest = int(row_sum_E.argmax())
    min_total = 2 * math.sqrt(row_sum_E[largest])  # below, the quadratic has no real root
    takes_larger_root = _smaller_roots(row_sum_E, min_total).sum() < min_total

    def roots(total: float) -> Array:
        a_E = _smaller_roots(row_sum_E, total)
        if takes_larger_root:
            a_E[largest] = total - a_E[largest]
        return a_E

    # S is unbounded if one expert is in every pair: then all other pairs are expected to be 0.
    low, high = min_total, min_total * 1e6
    for _ in range(BISECTION_STEPS):
        middle = math.sqrt(low * high)
        # The smaller roots decrease with S; the larger one increases faster than S.
        if (roots(middle).sum() < middle) == takes_larger_root:
            low = middle
        else:
            high = middle
    a_E = roots(high)
    return np.outer(a_E, a_E) * off_diagonal_EE


def _smaller_roots(row_sum_E: Array, total: float) -> Array:
    """The smaller a with a (total - a) = row sum, in a form without cancellation."""
    return 2 * row_sum_E / (total + np.sqrt(np.maximum(total**2 - 4 * row_sum_E, 0.0)))


def _layers(blocks: Sequence[int]) -> tuple[str, ...]:
    return tuple(f"layer {block:02d}" for block in blocks)


def _experts(count: int) -> tuple[str, ...]:
    return tuple(str(expert) for expert in range(count))
