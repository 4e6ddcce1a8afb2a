"""Reference implementation of the MoE layer's statistics, in plain Python."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pretrain.config.experts import MoEConfig
from pretrain.moe.layer import MoELayer
from tests.support.reference_moe import ReferenceRouting, Token


def reference_statistics(
    layer: MoELayer, logits: list[Tensor], routing: ReferenceRouting, token_list: list[Token]
) -> dict[str, Tensor]:
    """The fields of `RouterStats`, from which the auxiliary losses are computed."""
    config, experts = layer.config, layer.config.num_experts
    like = logits[0]
    zeros = {
        "prob_sum_ME": torch.zeros(2, experts).to(like),
        "z_sum_M": torch.zeros(2).to(like),
        "entropy_sum_M": torch.zeros(2).to(like),
        "load_sum_ME": torch.zeros(2, experts).to(like),
        "assignments_ME": torch.zeros(2, experts, dtype=torch.int64),
        "kept_ME": torch.zeros(2, experts, dtype=torch.int64),
    }
    stats = {name: list(value) for name, value in zeros.items()}
    for i, token in enumerate(token_list):
        m, pool = token.modality, range(experts)[config.pool(token.modality)]
        probs = routing.scores[i] / routing.scores[i].sum()
        entropy = -sum(probs[e] * probs[e].log() for e in pool)
        stats["prob_sum_ME"][m] = stats["prob_sum_ME"][m] + probs
        stats["z_sum_M"][m] = stats["z_sum_M"][m] + torch.logsumexp(logits[i][list(pool)], 0) ** 2
        stats["entropy_sum_M"][m] = stats["entropy_sum_M"][m] + entropy
        if layer.balance.load_weight:
            load = _load(config, logits[i], routing.noisy[i], pool)
            stats["load_sum_ME"][m] = stats["load_sum_ME"][m] + load
        for (expert, _), kept in zip(routing.assignments[i], routing.kept[i], strict=True):
            stats["assignments_ME"][m][expert] += 1
            stats["kept_ME"][m][expert] += kept
    return {name: torch.stack(value) for name, value in stats.items()}


def _load(config: MoEConfig, logits: Tensor, noisy: Tensor, pool: range) -> Tensor:
    """Probability of each expert to be in the top k if its noise is resampled; 0 outside
    the pool."""
    highest = sorted((noisy[e] for e in pool), key=lambda v: -float(v.detach()))
    noise_std = config.noise_std / config.num_experts
    margin = (highest[config.top_k - 1] - logits * config.temperature) / noise_std
    load = 0.5 * torch.erfc(margin / math.sqrt(2))
    return torch.stack([load[e] if e in pool else load[e] * 0 for e in range(config.num_experts)])
