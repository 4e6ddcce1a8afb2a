"""Load and routing of the sparse layers in the steps since the last log entry.

Shapes: L MoE layers, M modalities, E experts.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from pretrain.config.schema import RunConfig
from pretrain.moe.statistics import MODALITIES
from pretrain.train.log_entry import LayerMetrics, ModalityMetrics, RouterMetrics
from pretrain.train.step_result import StepResult

Array = np.ndarray[Any, Any]


def layer_metrics(
    last: StepResult, assignments_LME: Array, run: RunConfig
) -> tuple[LayerMetrics, ...]:
    """Loads and routing of every MoE layer.

    Loads are relative to the mean of the expert's pool: with modality pools, the experts of the
    other pool cannot receive its tokens.

    Args:
        last: The last step, for the statistics of its routers.
        assignments_LME: Assignments of all steps, `[MoE layers, modalities, experts]`.
        run: The experts and their pools.
    """
    layers = []
    for layer, block in enumerate(run.moe.blocks(run.model.num_layers)):
        load_ME = assignments_LME[layer]
        load_E = load_ME.sum(axis=0)
        pools = [
            load_E[pool] / max(1.0, float(load_E[pool].mean())) for pool in run.moe.pool_slices()
        ]
        ratio_E = np.concatenate(pools)
        modalities = {
            name: ModalityMetrics(
                tokens_per_expert=tuple(load_ME[index].astype(np.int64).tolist()),
                max_over_mean_load=max_over_mean(load_ME[index, run.moe.pool(index)]),
                router=router_metrics(last, run, layer, index),
            )
            for index, name in enumerate(MODALITIES)
        }
        layers.append(
            LayerMetrics(
                block=block,
                max_over_mean_load=float(ratio_E.max()),
                min_over_mean_load=float(ratio_E.min()),
                modalities=modalities,
            )
        )
    return tuple(layers)


def router_metrics(
    result: StepResult, run: RunConfig, layer: int, modality: int
) -> RouterMetrics | None:
    """Routing of one step in one layer and modality, by index; None without tokens."""
    stats, tokens = result.router, float(result.tokens_M[modality])
    if not tokens:
        return None
    mean_E = stats.prob_sum_ME[layer, modality] / tokens
    dropped = bias_range = None
    if run.moe.uses_capacity:
        assignments = float(stats.assignments_ME[layer, modality].sum())
        kept = float(stats.kept_ME[layer, modality].sum())
        dropped = 1 - kept / max(1.0, assignments)
    if len(result.biases):
        bias_index = min(modality, result.biases.shape[1] - 1)
        bias_E = result.biases[layer, bias_index, run.moe.pool(modality)]
        bias_range = float(bias_E.max() - bias_E.min())
    return RouterMetrics(
        entropy=float(stats.entropy_sum_M[layer, modality]) / tokens,
        mean_entropy=float(torch.special.entr(mean_E).sum()),
        top_probability=float(stats.top1_prob_sum_M[layer, modality]) / tokens,
        top1_ratio=float(stats.top1_ME[layer, modality].max()) / tokens,
        dropped=dropped,
        bias_range=bias_range,
    )


def max_over_mean(load_E: Array) -> float:
    """Largest expert load over the mean load; 1 is balanced, 0 means no tokens."""
    return float(load_E.max() / load_E.mean()) if load_E.sum() > 0 else 0.0
