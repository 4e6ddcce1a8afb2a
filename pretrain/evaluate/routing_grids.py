"""Routing as grids of ratios that a figure or a page can draw: 1 is what would be fair, or what chance would give.

Pure functions of counts. Shapes: L MoE layers, M modalities (0 image, 1 text), E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from pretrain.config.schema import MoEConfig
from pretrain.moe.tokens import MODALITIES

Array = np.ndarray[Any, Any]

ROUNDS = 500
"""Of the fitting in `expected_together`; each takes microseconds."""


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
        grids.append(Grid(f"{modality} tokens: load over a fair share", ratio_LE, _layers(blocks),
                          _experts(ratio_LE.shape[1])))
    return grids


def over_fair_share(load_LE: Array, pool: slice) -> Array:
    """Load divided by its mean over the pool's experts; nan for other experts and where there are no tokens."""
    ratio_LE = np.full(load_LE.shape, np.nan)
    inside = load_LE[:, pool].astype(np.float64)
    fair_L1 = inside.mean(axis=1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio_LE[:, pool] = np.where(fair_L1 > 0, inside / fair_L1, np.nan)
    return ratio_LE


def together_grids(together_LEE: Array, blocks: Sequence[int], what: str = "") -> list[Grid]:
    """How often two experts are chosen together, over what chance would give; a grid for each layer."""
    return [
        Grid(f"{row}{what}: chosen together, over chance", together_lift(together_EE), _experts(len(together_EE)),
             _experts(len(together_EE)))
        for row, together_EE in zip(_layers(blocks), together_LEE, strict=True)
    ]


def together_lift(together_EE: Array) -> Array:
    """Counts over `expected_together`, float64; nan on the diagonal and where less than one token is expected."""
    expected_EE = expected_together(together_EE)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(expected_EE >= 1, together_EE / expected_EE, np.nan)


def expected_together(together_EE: Array) -> Array:
    """Tokens that would choose both experts if choices had nothing to do with one another.

    A token never chooses the same expert twice, so the plain product of shares would call every pair rare. These
    numbers keep how often each expert is chosen with any other one, have nothing on the diagonal, and are
    otherwise a product a_i a_j (quasi-independence; fitted by iterative scaling).

    Args:
        together_EE: Tokens by pair of experts, symmetric; the diagonal is not read.

    Returns:
        float64 `[experts, experts]`.
    """
    counts_EE = together_EE.astype(np.float64) * (1 - np.eye(len(together_EE)))
    wanted_E = counts_EE.sum(axis=1)
    a_E = np.sqrt(wanted_E / max(1e-12, np.sqrt(wanted_E.sum())))
    for _ in range(ROUNDS):
        others_E = np.maximum(a_E.sum() - a_E, 1e-12)
        # The root halves the step in logarithms; the whole step would swing for ever between two states.
        a_E = np.sqrt(a_E * wanted_E / others_E)
    return np.outer(a_E, a_E) * (1 - np.eye(len(a_E)))


def _layers(blocks: Sequence[int]) -> tuple[str, ...]:
    return tuple(f"layer {block:02d}" for block in blocks)


def _experts(count: int) -> tuple[str, ...]:
    return tuple(str(expert) for expert in range(count))
