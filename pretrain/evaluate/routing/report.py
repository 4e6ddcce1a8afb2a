"""From counts to what a person wants to know of each expert: whom it serves, how surely, and what
it sees.

Pure functions of a `Tally`. The report is plain values, as they are written to JSON.

Shapes: L MoE layers, M modalities (0 image, 1 text), E experts, W words.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pretrain.config.experts import MoEConfig
from pretrain.evaluate.routing.grids import expected_coactivation, over_fair_share
from pretrain.evaluate.routing.tally import Tally
from pretrain.moe.tokens import MODALITIES

Array = np.ndarray[Any, Any]
Report = dict[str, Any]

FEWEST = 3
"""Tokens of a word that an expert must have seen before it is named: one or two are chance."""
LEAST_LIFT = 1.2
"""Words that are hardly more frequent than in all text say nothing of an expert."""
DRAWS = 4
"""Of as many tokens as an expert saw, to know what chance gives."""
PAIRS_SHOWN, SURPRISING = 5, 3.0
"""Pairs named of a layer and modality, and how many deviations they must be beyond chance."""


def routing_report(
    tally: Tally, words: Sequence[str], moe: MoEConfig, blocks: Sequence[int], *, top: int = 12
) -> Report:
    """Everything that was found out.

    Args:
        tally: The counts.
        words: By their numbers in the tally.
        moe: Of the run.
        blocks: Block of each layer.
        top: Words named of each expert.

    Returns:
        `pairs`, `tokens`, and `layers`, each with `load`, `experts` and `together`; see the
        functions below.
    """
    return {
        "pairs": tally.pairs,
        "tokens": dict(zip(MODALITIES, tally.tokens_M.tolist(), strict=True)),
        "num_experts": moe.num_experts,
        "top_k": moe.top_k,
        "routing": moe.routing,
        "layers": [
            {
                "block": block,
                "load": _load(tally, layer, moe),
                "experts": [
                    _expert(tally, layer, expert, words, top) for expert in range(moe.num_experts)
                ],
                "coactivation": {
                    modality: coactivated_pairs(tally.together_LMEE[layer, column])
                    for column, modality in enumerate(MODALITIES)
                },
                "together_counts": {
                    modality: tally.together_LMEE[layer, column].tolist()
                    for column, modality in enumerate(MODALITIES)
                },
            }
            for layer, block in enumerate(blocks)
        ],
    }


def _load(tally: Tally, layer: int, moe: MoEConfig) -> Report:
    """By modality: a fair share, busiest and idlest expert over it, how many experts an even load
    would have, entropy.

    A fair share of the modality's tokens is the mean over the experts that serve it; the entropy
    (nats) is the mean of a token's own scores.
    """
    found = {}
    for column, modality in enumerate(MODALITIES):
        pool, tokens = moe.pool(column), int(tally.tokens_M[column])
        ratio_E = over_fair_share(tally.visits_LME[layer, column][None], pool)[0, pool]
        known = tokens > 0
        found[modality] = {
            "fair": float(tally.visits_LME[layer, column, pool].mean()) / tokens if known else None,
            "max_over_mean": float(ratio_E.max()) if known else None,
            "min_over_mean": float(ratio_E.min()) if known else None,
            "used": effective_number(tally.visits_LME[layer, column]) if known else None,
            "entropy": float(tally.entropy_LM[layer, column]) / tokens if known else None,
        }
    return found


def _expert(tally: Tally, layer: int, expert: int, words: Sequence[str], top: int) -> Report:
    """One expert.

    `share` is the part of a modality's tokens that visit it; `lean` is -1 for patches only, 0 for
    equal shares, 1 for text only; `specialization` its absolute value; `weight` and `entropy`
    (nats) are means over its visits; `word_bits` says how far its words are from those of all text
    (0: the same).
    """
    visits_M = tally.visits_LME[layer, :, expert]
    shares = [
        float(visits) / max(1, int(tokens))
        for visits, tokens in zip(visits_M, tally.tokens_M, strict=True)
    ]
    total = int(visits_M.sum())
    lean = modality_lean(*shares)
    counts_W = tally.words_LEW[layer, expert]
    return {
        "expert": expert,
        "visits": dict(zip(MODALITIES, visits_M.tolist(), strict=True)),
        "share": dict(zip(MODALITIES, shares, strict=True)),
        "lean": lean,
        "specialization": None if lean is None else abs(lean),
        "weight": float(tally.weight_LME[layer, :, expert].sum()) / total if total else None,
        "entropy": float(tally.entropy_LME[layer, :, expert].sum()) / total if total else None,
        "word_bits": word_bits(counts_W, tally.words_W),
        "words": top_words(counts_W, tally.words_W, words, top),
        "patches": [
            {"sample": int(sample), "patch": int(place), "weight": round(float(weight), 4)}
            for sample, place, weight in zip(
                tally.patch_sample_LEX[layer, expert],
                tally.patch_place_LEX[layer, expert],
                tally.patch_weight_LEX[layer, expert],
                strict=True,
            )
            if sample >= 0
        ],
    }


def modality_lean(image: float, text: float) -> float | None:
    """Which modality an expert leans to, from the share of each one's tokens; None for an expert
    without visits.

    Shares, not counts: there are many more patches than words, so an expert that takes all alike
    sees mostly patches.
    """
    return (text - image) / (text + image) if image + text > 0 else None


def word_bits(counts_W: Array, base_W: Array) -> float | None:
    """Kullback-Leibler divergence of an expert's words from all words beyond chance, bits; None
    without words.

    Few tokens always look special. What as many tokens have that are drawn at random from all text,
    the mean of `DRAWS`, is taken off; so an expert that takes words at random has about 0.
    (Miller's formula of 1955, words / (2 tokens ln 2), wants many more tokens than words, and of a
    rare expert would leave nothing.)
    """
    total = int(counts_W.sum())
    if not total:
        return None
    random = np.random.default_rng(0).multivariate_hypergeometric(
        base_W, total, size=DRAWS, method="marginals"
    )
    by_chance = float(np.mean([_divergence(drawn_W, base_W) for drawn_W in random]))
    return max(0.0, _divergence(counts_W, base_W) - by_chance)


def _divergence(counts_W: Array, base_W: Array) -> float:
    """Kullback-Leibler divergence of counts from those of all, bits."""
    seen_W = counts_W > 0
    p, q = counts_W[seen_W] / counts_W.sum(), base_W[seen_W] / base_W.sum()
    return float((p * np.log2(p / q)).sum())


def top_words(counts_W: Array, base_W: Array, words: Sequence[str], top: int) -> list[Report]:
    """Words that an expert sees more often than others do: those that add most to `word_bits`, the
    first most.

    `lift` is the word's share of the expert's text tokens over its share of all text tokens.
    """
    if not counts_W.sum():
        return []
    with np.errstate(divide="ignore", invalid="ignore"):
        lift_W = (counts_W / counts_W.sum()) / (base_W / max(1, base_W.sum()))
        gain_W = np.where(
            (counts_W >= FEWEST) & (lift_W >= LEAST_LIFT), counts_W * np.log(lift_W), -1.0
        )
    order = np.argsort(-gain_W, kind="stable")[:top]
    return [
        {
            "word": words[number],
            "count": int(counts_W[number]),
            "lift": round(float(lift_W[number]), 3),
        }
        for number in order
        if gain_W[number] > 0
    ]


def coactivated_pairs(coactivation_EE: Array, shown: int = PAIRS_SHOWN) -> list[Report]:
    """The pairs of experts that share the most tokens beyond what chance would give, the first
    most.

    Ranked by the surplus over its deviation, (found - expected) / sqrt(expected): neither rare
    pairs with a large lift nor frequent ones with a small one come first by that alone.
    """
    expected_EE = expected_coactivation(coactivation_EE)
    surplus_EE = np.triu(
        (coactivation_EE - expected_EE) / np.sqrt(np.maximum(expected_EE, 1.0)), k=1
    )
    order = np.argsort(-surplus_EE, axis=None, kind="stable")[:shown]
    found = []
    for first, second in zip(*np.unravel_index(order, surplus_EE.shape), strict=True):
        if surplus_EE[first, second] >= SURPRISING:
            tokens, expected = (
                int(coactivation_EE[first, second]),
                float(expected_EE[first, second]),
            )
            found.append(
                {
                    "experts": [int(first), int(second)],
                    "tokens": tokens,
                    "expected": round(expected, 1),
                    "lift": round(tokens / max(1.0, expected), 3),
                }
            )
    return found


def effective_number(load_E: Array) -> float:
    """exp of the entropy of the load: as many experts as are used, if each were used alike."""
    share_E = load_E[load_E > 0] / max(1, load_E.sum())
    return float(np.exp(-(share_E * np.log(share_E)).sum()))
