"""Metrics of one trained run: losses at the end, evaluation results, and expert load.

Training metrics are means over the last tenth of the rows of `metrics.jsonl`.

Shapes: L MoE layers, M modalities, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.config.schema import RunConfig
from pretrain.evaluate.routing.report import effective_num_experts
from pretrain.model.count import count_flops, count_parameters
from pretrain.train.jsonl import METRICS_FILE, read_log
from pretrain.train.log_entry import LogEntry, RouterMetrics

MODALITIES = ("image", "text")
END_FRACTION = 0.1
"""Final fraction of a run over which metrics are averaged."""
DEAD_LOAD_RATIO = 0.01
"""An expert with less than this multiple of the mean load is dead."""

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
    rows = end_of_run(read_log(folder / METRICS_FILE))
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


def end_of_run(rows: Sequence[LogEntry]) -> Sequence[LogEntry]:
    """The last tenth of the rows, at least one."""
    return rows[-max(1, round(END_FRACTION * len(rows))) :]


def losses(rows: Sequence[LogEntry]) -> dict[str, float]:
    """Mean losses; `main` is the weighted sum without auxiliary losses."""
    terms = ("contrastive", "caption")
    weighted = [_mean(row.losses.weighted[term] for row in rows) for term in terms]
    means = {term: _mean(row.losses.terms[term] for row in rows) for term in terms}
    return {"main": sum(weighted)} | means


def routing(rows: Sequence[LogEntry], run: RunConfig) -> dict[str, Any] | None:
    """Expert load and router entropy; None for a dense run.

    Returns:
        `max_over_mean`: load of the busiest expert over the mean load of its pool, mean over
        layers; `experts` and `dead`: experts of all layers, and those with almost no load. For each
        modality: `max_over_mean`; `used`, the effective number of experts (that with the same
        entropy at uniform load); `entropy` of a token's scores and `mean_entropy` of the mean
        scores, nats; `dropped`, the fraction of assignments over capacity.
    """
    if not run.moe.blocks(run.model.num_layers):
        return None
    load_LME = expert_loads(rows)
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
        metrics[modality] = _modality_metrics(rows, load_LE, modality)
    return metrics


def _modality_metrics(rows: Sequence[LogEntry], load_LE: Array, modality: str) -> dict[str, float]:
    def layer_mean(value_of: Callable[[RouterMetrics], float]) -> float:
        """Mean over layers of the mean over rows."""
        return _mean(
            _mean(value_of(_router(row, layer, modality)) for row in rows)
            for layer in range(len(load_LE))
        )

    return {
        "max_over_mean": float(_max_over_mean(load_LE).mean()),
        "used": float(np.mean([effective_num_experts(load_E) for load_E in load_LE])),
        "entropy": layer_mean(lambda router: router.entropy),
        "mean_entropy": layer_mean(lambda router: router.mean_entropy),
        "dropped": layer_mean(lambda router: router.dropped or 0.0),
    }


def _router(row: LogEntry, layer: int, modality: str) -> RouterMetrics:
    router = row.layers[layer].modalities[modality].router
    assert router is not None, f"step {row.step} has no {modality} tokens"
    return router


def expert_loads(rows: Sequence[LogEntry]) -> Array:
    """Assignments summed over all rows, float64 `[L, M, E]`."""
    loads = [
        [
            [layer.modalities[modality].tokens_per_expert for modality in MODALITIES]
            for layer in row.layers
        ]
        for row in rows
    ]
    return np.sum(np.array(loads, dtype=np.float64), axis=0)  # type: ignore[no-any-return]


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))


def _max_over_mean(load_LE: Array) -> Array:
    """Maximum load over mean load of each layer, `[L]`."""
    ratio_L: Array = load_LE.max(axis=1) / np.maximum(load_LE.mean(axis=1), 1e-12)
    return ratio_L


def _num_dead(load_LE: Array) -> int:
    return int((load_LE < DEAD_LOAD_RATIO * load_LE.mean(axis=1, keepdims=True)).sum())


def text_tokens_per_pair(rows: Sequence[LogEntry], run: RunConfig) -> float:
    """Measured mean number of text tokens per pair."""
    tokens = _mean(row.throughput.tokens_per_second for row in rows)
    pairs = _mean(row.throughput.samples_per_second for row in rows)
    return max(0.0, tokens / pairs - run.model.num_patches)


def _scores(result: Mapping[str, Any]) -> dict[str, float]:
    """Retrieval and caption scores of one set, flat, percent."""
    scores = {}
    for direction in ("image_to_text", "text_to_image"):
        for rank, value in result[direction].items():
            scores[f"{direction}/{rank}"] = value
    scores["caption_exact"] = result["caption_exact"]
    scores["caption_tokens"] = result["caption_token_accuracy"]
    return scores
