"""The auxiliary losses of the routers computed token by token from their definitions, for tests."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pretrain.config.experts import BalanceConfig, MoEConfig
from pretrain.moe.statistics import RouterStats
from pretrain.moe.tokens import MODALITIES


def reference_terms(
    logits_LTE: Tensor,
    num_patch_tokens: int,
    config: MoEConfig,
    balance: BalanceConfig,
    stats: RouterStats,
) -> dict[str, Tensor]:
    """Every term that is a mean over the MoE layers, `balance` to `global_entropy_text`.

    Args:
        logits_LTE: Router logits of all layers.
        num_patch_tokens: Number of patch tokens; text tokens follow them.
        config: Number of experts, pools, and scores.
        balance: Has the target of the global entropy, `global_entropy_experts`.
        stats: The assignments and the smooth load are taken from here.
    """
    layers = []
    for layer, logits_TE in enumerate(logits_LTE):
        layers.append(
            _layer_terms(
                logits_TE,
                num_patch_tokens,
                config,
                balance,
                assignments_ME=stats.assignments_ME[layer].double(),
                load_ME=stats.load_sum_ME[layer],
            )
        )
    return {name: sum(terms[name] for terms in layers) / len(layers) for name in layers[0]}


def _layer_terms(
    logits_TE: Tensor,
    num_patch_tokens: int,
    config: MoEConfig,
    balance: BalanceConfig,
    *,
    assignments_ME: Tensor,
    load_ME: Tensor,
) -> dict[str, Tensor]:
    num_tokens, experts = logits_TE.shape
    members = [range(num_patch_tokens), range(num_patch_tokens, num_tokens)]
    pools = [list(range(experts)[config.pool(m)]) for m in (0, 1)]
    pool_of_token = [pools[0 if t < num_patch_tokens else 1] for t in range(num_tokens)]
    probs = [
        _probabilities(logits_TE[t] * config.temperature, pool_of_token[t], config.score_func)
        for t in range(num_tokens)
    ]
    z = [torch.logsumexp(logits_TE[t, pool_of_token[t]], 0) ** 2 for t in range(num_tokens)]

    if config.pools == "shared":
        balance_term = _balance(probs, pools[0], assignments_ME.sum(0))
        distinct_pools = [pools[0]]
    else:
        per_modality = [
            _balance([probs[t] for t in members[m]], pools[m], assignments_ME[m]) for m in (0, 1)
        ]
        balance_term = sum(per_modality) / 2
        distinct_pools = pools

    terms = {
        "balance": balance_term,
        "router_z": sum(z) / num_tokens,
        "importance": _squared_cv(sum(probs), distinct_pools),
        "load": _squared_cv(load_ME.sum(0), distinct_pools),
    }
    for m, name in enumerate(MODALITIES):
        modality_probs = [probs[t] for t in members[m]]
        target = getattr(balance.global_entropy_experts, name)
        terms[f"local_entropy_{name}"] = sum(_entropy(p) for p in modality_probs) / len(
            modality_probs
        )
        shortfall = math.log(target) - _entropy(sum(modality_probs) / len(modality_probs))
        terms[f"global_entropy_{name}"] = shortfall.clamp(min=0)
    return terms


def _probabilities(logits_E: Tensor, pool: list[int], score_func: str) -> Tensor:
    """Scores of one token, normalized over its pool."""
    in_pool = logits_E[pool]
    scores = torch.softmax(in_pool, 0) if score_func == "softmax" else torch.sigmoid(in_pool)
    return torch.zeros_like(logits_E).index_copy(0, torch.tensor(pool), scores / scores.sum())


def _entropy(probs_E: Tensor) -> Tensor:
    return -sum(p * p.log() for p in probs_E if p > 0)


def _balance(probs: list[Tensor], pool: list[int], assignments_E: Tensor) -> Tensor:
    fraction = assignments_E[pool] / assignments_E[pool].sum()
    mean_prob = sum(probs)[pool] / len(probs)
    return len(pool) * (fraction * mean_prob).sum()


def _squared_cv(sums_E: Tensor, pools: list[list[int]]) -> Tensor:
    per_pool = []
    for pool in pools:
        mean = sums_E[pool].mean()
        per_pool.append(((sums_E[pool] - mean) ** 2).mean() / mean**2)
    return sum(per_pool) / len(pools)
