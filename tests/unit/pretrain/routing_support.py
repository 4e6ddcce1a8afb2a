"""Counts and sampled assignments for tests of the routing report."""

from __future__ import annotations

import numpy as np

from pretrain.evaluate.routing.counts import RoutingCounts


def sample_pairs(weights: list[float], tokens: int, both_01: float = 0.0) -> np.ndarray:
    """Coactivation of tokens that are assigned to two different experts at random.

    Args:
        weights: Relative probability of each expert.
        tokens: Number of tokens.
        both_01: Probability of a token being assigned to experts 0 and 1 instead.
    """
    random = np.random.default_rng(0)
    probability = np.array(weights) / sum(weights)
    counts_EE = np.zeros((len(weights), len(weights)), dtype=np.int64)
    for _ in range(tokens):
        if random.random() < both_01:
            first, second = 0, 1
        else:
            first, second = random.choice(len(weights), 2, replace=False, p=probability)
        counts_EE[first, second] += 1
        counts_EE[second, first] += 1
    return counts_EE


def specialists() -> RoutingCounts:
    """Counts of two layers with four experts and two experts per token.

    In the first layer, experts 0 and 1 process the 40 patches, 2 and 3 the 20 text tokens; in the
    second, all experts process both modalities equally.
    """
    counts = RoutingCounts(2, 4)
    counts.pairs, counts.tokens_M = 4, np.array([40, 20])
    counts.load_LME[0] = [[40, 40, 0, 0], [0, 0, 20, 20]]
    counts.load_LME[1] = [[20, 20, 20, 20], [10, 10, 10, 10]]
    counts.weight_LME[:] = 0.5 * counts.load_LME
    counts.entropy_LME[:] = 1.2 * counts.load_LME
    counts.entropy_LM[:] = [1.2, 0.7] * counts.tokens_M
    counts.words_W = np.array([10, 10])
    counts.words_LEW = np.array(
        [[[0, 0], [0, 0], [10, 10], [10, 10]], [[10, 0], [10, 0], [0, 10], [0, 10]]]
    )
    return counts
