"""Routing as grids of ratios that a figure or a page can draw: 1 is what would be fair, or what
chance would give.

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

HALVINGS = 60
"""Of the interval in which `expected_coactivation` looks for its one unknown; as many as float64 can
tell apart."""


class Grid(NamedTuple):
    """A table of ratios to draw."""

    title: str
    ratio_RC: Array
    """float64 `[rows, columns]`, at least 0; nan where there is nothing to say."""
    rows: tuple[str, ...]
    columns: tuple[str, ...]


def load_grids(load_LME: Array, blocks: Sequence[int], moe: MoEConfig) -> list[Grid]:
    """Load of each expert over a fair share, a grid for each modality.

    Args:
        load_LME: Token choices.
        blocks: Block of each layer.
        moe: Knows which experts serve a modality; the others have no value.
    """
    grids = []
    for column, modality in enumerate(MODALITIES):
        ratio_LE = over_fair_share(load_LME[:, column], moe.pool(column))
        grids.append(
            Grid(
                f"{modality} tokens: load over a fair share",
                ratio_LE,
                _layers(blocks),
                _experts(ratio_LE.shape[1]),
            )
        )
    return grids


def over_fair_share(load_LE: Array, pool: slice) -> Array:
    """Load divided by its mean over the pool's experts; nan for other experts and where there are
    no tokens."""
    ratio_LE = np.full(load_LE.shape, np.nan)
    inside = load_LE[:, pool].astype(np.float64)
    fair_L1 = inside.mean(axis=1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio_LE[:, pool] = np.where(fair_L1 > 0, inside / fair_L1, np.nan)
    return ratio_LE


def coactivation_grids(
    coactivation_LEE: Array, blocks: Sequence[int], moe: MoEConfig, what: str = ""
) -> list[Grid]:
    """How often two experts are chosen together, over what chance would give; a grid for each
    layer."""
    return [
        Grid(
            f"{row}{what}: chosen together, over chance",
            coactivation_lift(coactivation_EE, moe.pool_slices()),
            _experts(len(coactivation_EE)),
            _experts(len(coactivation_EE)),
        )
        for row, coactivation_EE in zip(_layers(blocks), coactivation_LEE, strict=True)
    ]


def coactivation_lift(coactivation_EE: Array, pools: Sequence[slice]) -> Array:
    """Counts over `expected_coactivation` of each pool by itself, float64 `[experts, experts]`.

    nan on the diagonal, for experts of different pools (no token can choose both) and where less
    than one token is expected.
    """
    lift_EE = np.full(coactivation_EE.shape, np.nan)
    for pool in pools:
        counts_EE = coactivation_EE[pool, pool]
        expected_EE = expected_coactivation(counts_EE)
        known_EE = expected_EE >= 1
        lift_EE[pool, pool][known_EE] = counts_EE[known_EE] / expected_EE[known_EE]
    return lift_EE


def expected_coactivation(coactivation_EE: Array) -> Array:
    """Tokens that would choose both experts if choices had nothing to do with one another.

    A token never chooses the same expert twice, so the plain product of shares would call every
    pair rare. These numbers keep how often each expert is chosen with any other one, have nothing
    on the diagonal, and are otherwise a product a_i a_j (quasi-independence).

    With S the sum of all a that means a_i (S - a_i) = w_i, so a_i is the smaller root of a
    quadratic, and for the expert with the largest w perhaps the larger one: S is the only unknown.
    Iterative scaling would need thousands of rounds where nearly every token chooses the same
    expert.

    Args:
        coactivation_EE: Tokens by pair of experts, symmetric; the diagonal is not read.

    Returns:
        float64 `[experts, experts]`.
    """
    apart_EE = 1 - np.eye(len(coactivation_EE))
    wanted_E = (coactivation_EE * apart_EE).sum(axis=1)
    if not wanted_E.any():
        return np.zeros_like(apart_EE)
    busiest = int(wanted_E.argmax())
    least = 2 * math.sqrt(wanted_E[busiest])  # below, the busiest expert has no root
    larger = _smaller_roots(wanted_E, least).sum() < least

    def roots(total: float) -> Array:
        a_E = _smaller_roots(wanted_E, total)
        if larger:
            a_E[busiest] = total - a_E[busiest]
        return a_E

    # Without bound where one expert is in every pair: then all others have 0 with one another.
    low, high = least, least * 1e6
    for _ in range(HALVINGS):
        middle = math.sqrt(low * high)
        # The smaller roots shrink as S grows, the larger one grows faster than S.
        if (roots(middle).sum() < middle) == larger:
            low = middle
        else:
            high = middle
    a_E = roots(high)
    return np.outer(a_E, a_E) * apart_EE


def _smaller_roots(wanted_E: Array, total: float) -> Array:
    """a in a (total - a) = wanted, the smaller one; written so that nothing cancels."""
    return 2 * wanted_E / (total + np.sqrt(np.maximum(total**2 - 4 * wanted_E, 0.0)))


def _layers(blocks: Sequence[int]) -> tuple[str, ...]:
    return tuple(f"layer {block:02d}" for block in blocks)


def _experts(count: int) -> tuple[str, ...]:
    return tuple(str(expert) for expert in range(count))
