"""Metrics of one trained run: losses at the end, evaluation results, and expert load.

Training metrics are means over the last tenth of the rows of `metrics.jsonl`.

Shapes: L MoE layers, M modalities, E experts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.config.schema import RunConfig
from pretrain.evaluate.routing.report import effective_num_experts
from pretrain.model.count import count_flops, count_parameters

MODALITIES = ("image", "text")
END_FRACTION = 0.1
"""Final fraction of a run over which metrics are averaged."""
DEAD_LOAD_RATIO = 0.01
"""An expert with less than this multiple of the mean load is dead."""

Row = Mapping[str, Any]
Array = np.ndarray[Any, Any]


def evaluate_run(folder: Path) -> dict[str, Any]:
    """Evaluate a trained run on its held-out sets; returns all metrics as JSON values."""
    from pretrain.checkpoint.reader import find_latest, read_meta
    from pretrain.evaluate.command import evaluate_sets
    from pretrain.evaluate.trained_model import load_model

    trained = load_model(folder)
    checkpoint = find_latest(folder / "checkpoints")
    assert checkpoint is not None, "load_model needs a checkpoint"
    state = read_meta(checkpoint).state["train"]
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = end_of_run([json.loads(line) for line in lines])
    run = trained.run
    parameters = count_parameters(run.model, run.moe)
    flops = count_flops(run.model, run.moe, text_tokens=text_tokens_per_pair(rows, run))
    evaluations = evaluate_sets(trained, run.eval.sets)
    return {
        "seed": run.seed,
        "steps": state["step"],
        "pairs": state["samples_seen"],
        "seconds": state["seconds"],
        "kilo_parameters": parameters.total / 1e3,
        "kilo_active_parameters": parameters.active / 1e3,
        "mega_flops_per_pair": flops.training / 1e6,
        "loss": losses(rows),
        "eval": {name: _scores(result) for name, result in evaluations.items()},
        "routing": routing(rows, run),
    }


def end_of_run(rows: Sequence[Row]) -> Sequence[Row]:
    """The last tenth of the rows, at least one."""
    return rows[-max(1, round(END_FRACTION * len(rows))) :]


def losses(rows: Sequence[Row]) -> dict[str, float]:
    """Mean losses; `main` is the weighted sum without auxiliary losses."""
    terms = ("contrastive", "caption")
    weighted = [mean_of(rows, f"loss/weighted/{term}") for term in terms]
    return {"main": sum(weighted)} | {term: mean_of(rows, f"loss/{term}") for term in terms}


def routing(rows: Sequence[Row], run: RunConfig) -> dict[str, Any] | None:
    """Expert load and router entropy; None for a dense run.

    Returns:
        `max_over_mean`: load of the busiest expert over the mean load of its pool, mean over
        layers; `experts` and `dead`: experts of all layers, and those with almost no load. For each
        modality: `max_over_mean`; `used`, the effective number of experts (that with the same
        entropy at uniform load); `entropy` of a token's scores and `mean_entropy` of the mean
        scores, nats; `dropped`, the fraction of assignments over capacity.
    """
    blocks = run.moe.blocks(run.model.num_layers)
    if not blocks:
        return None
    load_LME = expert_loads(rows, blocks)
    pools = [load_LME[:, :, pool].sum(axis=1) for pool in run.moe.pool_slices()]
    metrics: dict[str, Any] = {
        "max_over_mean": float(
            np.max([_max_over_mean(load_LE) for load_LE in pools], axis=0).mean()
        ),
        "experts": load_LME[:, 0].size,
        "dead": int(sum(map(_num_dead, pools))),
    }
    for column, modality in enumerate(MODALITIES):
        load_LE = load_LME[:, column, run.moe.pool(column)]
        metrics[modality] = _modality_metrics(rows, load_LE, blocks, modality)
    return metrics


def _modality_metrics(
    rows: Sequence[Row], load_LE: Array, blocks: Sequence[int], modality: str
) -> dict[str, float]:
    layers = [f"layer_{block:02d}/{modality}" for block in blocks]

    def layer_mean(metric: str, missing: float | None = None) -> float:
        values = [mean_of(rows, f"moe/{metric}/{layer}", missing=missing) for layer in layers]
        return float(np.mean(values))

    return {
        "max_over_mean": float(_max_over_mean(load_LE).mean()),
        "used": float(np.mean([effective_num_experts(load_E) for load_E in load_LE])),
        "entropy": layer_mean("entropy"),
        "mean_entropy": layer_mean("mean_entropy"),
        "dropped": layer_mean("dropped", missing=0.0),
    }


def expert_loads(rows: Sequence[Row], blocks: Sequence[int]) -> Array:
    """Assignments summed over all rows, float64 `[L, M, E]`."""

    def load_E(block: int, modality: str) -> Array:
        name = f"moe/tokens_per_expert/layer_{block:02d}/{modality}"
        load: Array = np.sum([row[name] for row in rows], axis=0)
        return load

    loads = [[load_E(block, modality) for modality in MODALITIES] for block in blocks]
    return np.array(loads, dtype=np.float64)


def mean_of(rows: Sequence[Row], name: str, missing: float | None = None) -> float:
    """Mean of a metric over rows; "nan" strings count as NaN.

    Args:
        rows: Rows of `metrics.jsonl`.
        name: The metric.
        missing: Value for rows without the metric; None makes them an error.

    Raises:
        KeyError: A row lacks the metric and `missing` is None.
    """
    values = [row[name] if missing is None else row.get(name, missing) for row in rows]
    return float(np.mean([float(value) for value in values]))


def _max_over_mean(load_LE: Array) -> Array:
    """Maximum load over mean load of each layer, `[L]`."""
    ratio_L: Array = load_LE.max(axis=1) / np.maximum(load_LE.mean(axis=1), 1e-12)
    return ratio_L


def _num_dead(load_LE: Array) -> int:
    return int((load_LE < DEAD_LOAD_RATIO * load_LE.mean(axis=1, keepdims=True)).sum())


def text_tokens_per_pair(rows: Sequence[Row], run: RunConfig) -> float:
    """Measured mean number of text tokens per pair."""
    tokens = mean_of(rows, "perf/tokens_per_second") / mean_of(rows, "perf/samples_per_second")
    return max(0.0, tokens - run.model.num_patches)


def _scores(result: Mapping[str, Any]) -> dict[str, float]:
    """Retrieval and caption scores of one set, flat, percent."""
    scores = {}
    for direction in ("image_to_text", "text_to_image"):
        for rank, value in result[direction].items():
            scores[f"{direction}/{rank}"] = value
    scores["caption_exact"] = result["caption_exact"]
    scores["caption_tokens"] = result["caption_token_accuracy"]
    return scores
