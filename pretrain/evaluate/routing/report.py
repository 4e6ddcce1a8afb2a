"""Statistics of each layer and expert from counts, as JSON values.

Pure functions of a `RoutingCounts`.

Shapes: L MoE layers, M modalities (0 image, 1 text), E experts, W words.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pretrain.config.experts import MoEConfig
from pretrain.evaluate.routing.counts import RoutingCounts
from pretrain.evaluate.routing.grids import expected_coactivation, load_over_mean
from pretrain.moe.tokens import MODALITIES

Array = np.ndarray[Any, Any]
Report = dict[str, Any]

MIN_WORD_COUNT = 3
"""Tokens of a word that an expert must have processed before the word is listed."""
MIN_WORD_LIFT = 1.2
"""Minimum frequency of a listed word, relative to its frequency in all text."""
RANDOM_SAMPLES = 4
"""Random samples of text tokens from which the divergence of chance is estimated."""
MAX_PAIRS, MIN_DEVIATIONS = 5, 3.0
"""Pairs of experts listed for a layer and modality, and by how many standard deviations they must
exceed chance."""


def routing_report(
    counts: RoutingCounts,
    words: Sequence[str],
    moe: MoEConfig,
    blocks: Sequence[int],
    *,
    max_words: int = 12,
) -> Report:
    """The report of a model.

    Args:
        counts: Counts over a set of pairs.
        words: Words by their index in the counts.
        moe: Expert settings of the run.
        blocks: Block index of each layer.
        max_words: Words listed for each expert.

    Returns:
        `pairs`, `tokens`, `num_experts`, `top_k`, `routing` and `layers`, each with `block`,
        `load`, `experts`, `coactivation` and `coactivation_counts`; see the functions below.
    """
    return {
        "pairs": counts.pairs,
        "tokens": dict(zip(MODALITIES, counts.tokens_M.tolist(), strict=True)),
        "num_experts": moe.num_experts,
        "top_k": moe.top_k,
        "routing": moe.routing,
        "layers": [
            {
                "block": block,
                "load": _load(counts, layer, moe),
                "experts": [
                    _expert(counts, layer, expert, words, max_words)
                    for expert in range(moe.num_experts)
                ],
                "coactivation": {
                    modality: coactivated_pairs(counts.coactivation_LMEE[layer, column])
                    for column, modality in enumerate(MODALITIES)
                },
                "coactivation_counts": {
                    modality: counts.coactivation_LMEE[layer, column].tolist()
                    for column, modality in enumerate(MODALITIES)
                },
            }
            for layer, block in enumerate(blocks)
        ],
    }


def _load(counts: RoutingCounts, layer: int, moe: MoEConfig) -> Report:
    """Load of a layer by modality; all values are None without tokens.

    `uniform_fraction` is the fraction of the modality's tokens that each expert of its pool would
    process with uniform load; `max_over_mean` and `min_over_mean` are the largest and smallest load
    relative to it; `effective_experts` is the number of experts whose uniform load would have the
    same entropy; `entropy` (nats) is the mean entropy of a token's scores.
    """
    load = {}
    for column, modality in enumerate(MODALITIES):
        load_E, tokens = counts.load_LME[layer, column], int(counts.tokens_M[column])
        pool = moe.pool(column)
        ratio_E = load_over_mean(load_E[None], pool)[0, pool]
        has_tokens = tokens > 0
        load[modality] = {
            "uniform_fraction": float(load_E[pool].mean()) / tokens if has_tokens else None,
            "max_over_mean": float(ratio_E.max()) if has_tokens else None,
            "min_over_mean": float(ratio_E.min()) if has_tokens else None,
            "effective_experts": effective_num_experts(load_E) if has_tokens else None,
            "entropy": float(counts.entropy_LM[layer, column]) / tokens if has_tokens else None,
        }
    return load


def _expert(
    counts: RoutingCounts, layer: int, expert: int, words: Sequence[str], max_words: int
) -> Report:
    """One expert.

    `num_tokens` are its tokens by modality and `token_fraction` their fraction of all tokens of the
    modality; `modality_preference` is -1 for patches only, 0 for equal fractions, 1 for text only,
    and `specialization` its absolute value; `weight` and `entropy` (nats) are means over its
    tokens; `word_bits` is the divergence of its words from those of all text (0 if equal).
    """
    load_M = counts.load_LME[layer, :, expert]
    fractions = [
        float(load) / max(1, int(tokens))
        for load, tokens in zip(load_M, counts.tokens_M, strict=True)
    ]
    total = int(load_M.sum())
    preference = modality_preference(*fractions)
    counts_W = counts.words_LEW[layer, expert]
    return {
        "expert": expert,
        "num_tokens": dict(zip(MODALITIES, load_M.tolist(), strict=True)),
        "token_fraction": dict(zip(MODALITIES, fractions, strict=True)),
        "modality_preference": preference,
        "specialization": None if preference is None else abs(preference),
        "weight": float(counts.weight_LME[layer, :, expert].sum()) / total if total else None,
        "entropy": float(counts.entropy_LME[layer, :, expert].sum()) / total if total else None,
        "word_bits": word_bits(counts_W, counts.words_W),
        "words": top_words(counts_W, counts.words_W, words, max_words),
        "patches": _patches(counts, layer, expert),
    }


def _patches(counts: RoutingCounts, layer: int, expert: int) -> list[Report]:
    return [
        {"sample": int(sample), "patch": int(patch), "weight": round(float(weight), 4)}
        for sample, patch, weight in zip(
            counts.patch_sample_LEX[layer, expert],
            counts.patch_index_LEX[layer, expert],
            counts.patch_weight_LEX[layer, expert],
            strict=True,
        )
        if sample >= 0
    ]


def modality_preference(image: float, text: float) -> float | None:
    """(text - image) / (text + image), of fractions of tokens; None for an expert without tokens.

    Fractions, not counts: there are many more patches than text tokens, so an expert without a
    preference processes mostly patches.
    """
    return (text - image) / (text + image) if image + text > 0 else None


def word_bits(counts_W: Array, base_W: Array) -> float | None:
    """Kullback-Leibler divergence of an expert's words from all words, minus that of chance, bits.

    None without words. A small sample always diverges. The mean divergence of `RANDOM_SAMPLES`
    random samples of as many tokens is subtracted, so an expert without preference has about 0.
    (Miller's correction of 1955, words / (2 tokens ln 2), requires many more tokens than words; for
    an expert with few tokens it would exceed the divergence.)
    """
    total = int(counts_W.sum())
    if not total:
        return None
    samples = np.random.default_rng(0).multivariate_hypergeometric(
        base_W, total, size=RANDOM_SAMPLES, method="marginals"
    )
    chance = float(np.mean([_divergence(sample_W, base_W) for sample_W in samples]))
    return max(0.0, _divergence(counts_W, base_W) - chance)


def _divergence(counts_W: Array, base_W: Array) -> float:
    """Kullback-Leibler divergence between the distributions of two counts, bits."""
    present_W = counts_W > 0
    p, q = counts_W[present_W] / counts_W.sum(), base_W[present_W] / base_W.sum()
    return float((p * np.log2(p / q)).sum())


def top_words(counts_W: Array, base_W: Array, words: Sequence[str], max_words: int) -> list[Report]:
    """Words that contribute most to the divergence of an expert's words, in descending order.

    `lift` is the word's fraction of the expert's text tokens over its fraction of all text tokens.
    """
    if not counts_W.sum():
        return []
    with np.errstate(divide="ignore", invalid="ignore"):
        lift_W = (counts_W / counts_W.sum()) / (base_W / max(1, base_W.sum()))
        is_listed_W = (counts_W >= MIN_WORD_COUNT) & (lift_W >= MIN_WORD_LIFT)
        gain_W = np.where(is_listed_W, counts_W * np.log(lift_W), -1.0)
    order = np.argsort(-gain_W, kind="stable")[:max_words]
    return [
        {
            "word": words[index],
            "count": int(counts_W[index]),
            "lift": round(float(lift_W[index]), 3),
        }
        for index in order
        if gain_W[index] > 0
    ]


def coactivated_pairs(coactivation_EE: Array, max_pairs: int = MAX_PAIRS) -> list[Report]:
    """Pairs of experts that exceed chance most, in descending order.

    Ranked by (count - expected) / sqrt(expected), so that neither rare pairs with a large lift nor
    frequent ones with a small lift dominate.
    """
    expected_EE = expected_coactivation(coactivation_EE)
    deviations_EE = (coactivation_EE - expected_EE) / np.sqrt(np.maximum(expected_EE, 1.0))
    deviations_EE = np.triu(deviations_EE, k=1)
    order = np.argsort(-deviations_EE, axis=None, kind="stable")[:max_pairs]

    pairs = []
    for first, second in zip(*np.unravel_index(order, deviations_EE.shape), strict=True):
        if deviations_EE[first, second] < MIN_DEVIATIONS:
            continue
        tokens, expected = int(coactivation_EE[first, second]), float(expected_EE[first, second])
        pairs.append(
            {
                "experts": [int(first), int(second)],
                "tokens": tokens,
                "expected": round(expected, 1),
                "lift": round(tokens / max(1.0, expected), 3),
            }
        )
    return pairs


def effective_num_experts(load_E: Array) -> float:
    """exp of the entropy of the load: the number of experts if each had the same load."""
    fraction_E = load_E[load_E > 0] / max(1, load_E.sum())
    return float(np.exp(-(fraction_E * np.log(fraction_E)).sum()))
