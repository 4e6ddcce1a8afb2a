"""Grids of expert load and coactivation, and the chance model of coactivation.

Shapes: R rows and C columns of a grid, L MoE layers, M modalities, E experts.
"""

from __future__ import annotations

import numpy as np
import pytest

from pretrain.config.experts import MoEConfig
from pretrain.evaluate.routing.grids import (
    coactivation_grids,
    coactivation_lift,
    expected_coactivation,
    load_grids,
    load_over_mean,
)
from pretrain.evaluate.routing.report import coactivated_pairs
from tests.unit.pretrain.routing_support import sample_pairs, specialists

ALL = (slice(None),)


def test_independent_assignments_have_a_lift_of_one() -> None:
    lift_EE = coactivation_lift(sample_pairs([3, 1, 1, 1, 2, 1], 8000), ALL)
    off_diagonal = ~np.eye(6, dtype=bool)
    assert np.isnan(np.diag(lift_EE)).all()
    assert np.abs(lift_EE[off_diagonal] - 1).max() < 0.15


def test_expected_coactivation_keeps_row_sums() -> None:
    counts_EE = sample_pairs([5, 1, 1, 2], 2000, both_01=0.2)
    expected_EE = expected_coactivation(counts_EE + np.diag([7, 7, 7, 7]))
    np.testing.assert_allclose(expected_EE.sum(axis=1), counts_EE.sum(axis=1), rtol=1e-6)
    np.testing.assert_allclose(expected_EE, expected_EE.T)
    assert (np.diag(expected_EE) == 0).all()
    # A product a_i a_j off the diagonal: ratios of rows do not depend on the column.
    assert expected_EE[0, 2] * expected_EE[1, 3] == pytest.approx(
        expected_EE[0, 3] * expected_EE[1, 2]
    )


@pytest.mark.parametrize("fraction", [0.5, 0.9, 0.999])
def test_expected_coactivation_is_exact_for_uneven_load(fraction: float) -> None:
    counts_EE = sample_pairs([fraction, *[(1 - fraction) / 5] * 5], 3000)
    expected_EE = expected_coactivation(counts_EE)
    np.testing.assert_allclose(expected_EE.sum(axis=1), counts_EE.sum(axis=1), rtol=1e-6)
    assert expected_EE[0, 2] * expected_EE[1, 3] == pytest.approx(
        expected_EE[0, 3] * expected_EE[1, 2]
    )


def test_no_pairs_are_expected_without_coactivation() -> None:
    assert not expected_coactivation(np.zeros((4, 4), dtype=np.int64)).any()
    assert np.isnan(coactivation_lift(np.diag([5, 3, 0]), ALL)).all()
    assert coactivated_pairs(np.diag([5, 3, 0])) == []
    assert expected_coactivation(np.array([[9]])).tolist() == [[0]]


@pytest.mark.parametrize("others", [[1598, 277, 825], [2700], [5, 0, 1]])
def test_an_expert_in_every_pair_explains_all_coactivation(others: list[int]) -> None:
    counts_EE = np.zeros((len(others) + 1, len(others) + 1), dtype=np.int64)
    counts_EE[0, 1:] = counts_EE[1:, 0] = others
    np.testing.assert_allclose(expected_coactivation(counts_EE), counts_EE, atol=1e-3)
    lift_EE = coactivation_lift(counts_EE, ALL)
    assert np.isnan(lift_EE[1:, 1:]).all() and np.nanmax(np.abs(lift_EE - 1)) < 1e-3


def test_pools_are_fitted_separately() -> None:
    image_EE, text_EE = sample_pairs([3, 1, 1], 4000), sample_pairs([1, 1, 2], 1000)
    both_EE = np.block([[image_EE, np.zeros_like(image_EE)], [np.zeros_like(text_EE), text_EE]])
    lift_EE = coactivation_lift(both_EE, (slice(0, 3), slice(3, 6)))
    assert np.isnan(lift_EE[:3, 3:]).all() and np.isnan(lift_EE[3:, :3]).all()
    np.testing.assert_array_equal(lift_EE[:3, :3], coactivation_lift(image_EE, ALL))
    np.testing.assert_array_equal(lift_EE[3:, 3:], coactivation_lift(text_EE, ALL))

    (grid,) = coactivation_grids(both_EE[None], (1,), MoEConfig(num_experts=6, pools="modality"))
    np.testing.assert_array_equal(grid.ratio_RC, lift_EE)


def test_coactivation_grids_have_one_grid_per_layer() -> None:
    counts_EE = sample_pairs([1] * 6, 1000, both_01=0.3)
    first, second = coactivation_grids(
        np.stack([counts_EE, np.zeros_like(counts_EE)]),
        (2, 5),
        MoEConfig(num_experts=6),
        ", text tokens",
    )
    assert first.title.startswith("layer 02, text tokens:")
    assert first.ratio_RC[0, 1] > 1.2
    assert np.nanmax(first.ratio_RC[0, 2:]) < 1 < np.nanmin(first.ratio_RC[2, 3:])
    assert np.isnan(second.ratio_RC).all()


def test_pairs_above_chance_are_listed_first() -> None:
    pairs = coactivated_pairs(sample_pairs([1] * 6, 4000, both_01=0.15))
    assert pairs[0]["experts"] == [0, 1]
    assert pairs[0]["lift"] > 1.5 and pairs[0]["tokens"] > pairs[0]["expected"]
    assert coactivated_pairs(sample_pairs([1] * 6, 4000)) == []


def test_load_is_relative_to_the_mean_of_the_pool() -> None:
    moe = MoEConfig(num_experts=4, pools="modality")
    image, text = load_grids(specialists().load_LME, (1, 3), moe)
    assert np.isnan(image.ratio_RC[:, 2:]).all() and (image.ratio_RC[0, :2] == 1).all()
    assert np.isnan(text.ratio_RC[:, :2]).all() and (text.ratio_RC[0, 2:] == 1).all()


def test_load_without_tokens_has_no_value() -> None:
    assert np.isnan(load_over_mean(np.zeros((2, 3), dtype=np.int64), slice(0, 3))).all()
