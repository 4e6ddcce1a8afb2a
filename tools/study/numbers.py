"""The numbers of one trained run: its losses at the end, what it can do, and how evenly its experts
were used.

Training writes everything into `metrics.jsonl`; the last tenth of its rows stands for the end of
the run.

Shapes: L MoE layers, M modalities, E experts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.config.schema import RunConfig
from pretrain.evaluate.routing.report import effective_number
from pretrain.model.count import count_flops, count_parameters

MODALITIES = ("image", "text")
END_SHARE = 0.1
"""Last part of a run that its numbers are means over."""
DEAD_SHARE = 0.01
"""An expert with less than this part of a fair share is dead."""

Row = Mapping[str, Any]


def judge(folder: Path) -> dict[str, Any]:
    """All numbers of a trained run, as plain values; judges it on its held-out sets."""
    from pretrain.checkpoint.reader import find_latest, read_meta
    from pretrain.evaluate.command import evaluate_sets
    from pretrain.evaluate.trained import load_trained

    trained = load_trained(folder)
    checkpoint = find_latest(folder / "checkpoints")
    assert checkpoint is not None, "load_trained found it"
    state = read_meta(checkpoint).state["train"]
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = end_of_run([json.loads(line) for line in lines])
    run = trained.run
    parameters = count_parameters(run.model, run.moe)
    return {
        "seed": run.seed,
        "steps": state["step"],
        "pairs": state["samples_seen"],
        "seconds": state["seconds"],
        "kilo_parameters": parameters.total / 1e3,
        "kilo_active_parameters": parameters.active / 1e3,
        "mega_flops_per_pair": count_flops(
            run.model, run.moe, text_tokens=_text_tokens(rows, run)
        ).training
        / 1e6,
        "loss": losses(rows),
        "eval": {
            name: _scores(result) for name, result in evaluate_sets(trained, run.eval.sets).items()
        },
        "routing": routing(rows, run),
    }


def end_of_run(rows: Sequence[Row]) -> Sequence[Row]:
    """The last tenth of the rows, at least one."""
    return rows[-max(1, round(END_SHARE * len(rows))) :]


def losses(rows: Sequence[Row]) -> dict[str, float]:
    """Means over rows; `main` is what every way of balancing has in common: contrast and captions,
    weighted."""
    found = {name: mean_of(rows, f"loss/{name}") for name in ("contrastive", "caption")}
    weighted = [mean_of(rows, f"loss/weighted/{name}") for name in ("contrastive", "caption")]
    return {"main": sum(weighted)} | found


def routing(rows: Sequence[Row], run: RunConfig) -> dict[str, Any] | None:
    """How evenly experts were used at the end; None for a run without any.

    Loads are the busiest expert over a fair share of those that serve the modality, mean over
    layers; `used` is the number of experts that an even load with the same entropy would have;
    `entropy` (nats) is a token's own; `dropped` the share of choices without a place; `dead` counts
    experts of all layers.
    """
    blocks = run.moe.blocks(run.model.num_layers)
    if not blocks:
        return None
    load_LME = expert_loads(rows, blocks)
    pools = [load_LME[:, :, pool].sum(axis=1) for pool in run.moe.pool_slices()]
    found: dict[str, Any] = {
        "max_over_mean": float(np.max([_busiest(load_LE) for load_LE in pools], axis=0).mean()),
        "experts": load_LME[:, 0].size,
        "dead": int(sum(map(_dead, pools))),
    }
    for column, modality in enumerate(MODALITIES):
        load_LE = load_LME[:, column, run.moe.pool(column)]
        layers = [f"layer_{block:02d}/{modality}" for block in blocks]
        found[modality] = {
            "max_over_mean": _mean_max(load_LE),
            "used": float(np.mean([effective_number(load_E) for load_E in load_LE])),
            "entropy": float(np.mean([mean_of(rows, f"moe/entropy/{layer}") for layer in layers])),
            "mean_entropy": float(
                np.mean([mean_of(rows, f"moe/mean_entropy/{layer}") for layer in layers])
            ),
            "dropped": float(
                np.mean([mean_of(rows, f"moe/dropped/{layer}", missing=0.0) for layer in layers])
            ),
        }
    return found


def expert_loads(rows: Sequence[Row], blocks: Sequence[int]) -> np.ndarray[Any, Any]:
    """Token choices over all rows, float64 `[L, M, E]`."""
    return np.array(
        [
            [
                np.sum(
                    [row[f"moe/tokens_per_expert/layer_{block:02d}/{modality}"] for row in rows],
                    axis=0,
                )
                for modality in MODALITIES
            ]
            for block in blocks
        ],
        dtype=np.float64,
    )


def mean_of(rows: Sequence[Row], name: str, missing: float | None = None) -> float:
    """Mean of a number over rows; numbers that are none ("nan") count as such."""
    return float(
        np.mean([float(row[name] if missing is None else row.get(name, missing)) for row in rows])
    )


def _mean_max(load_LE: np.ndarray[Any, Any]) -> float:
    """The busiest expert over a fair share, mean over layers."""
    return float(_busiest(load_LE).mean())


def _busiest(load_LE: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The busiest expert of each layer over a fair share, `[L]`."""
    ratio_L: np.ndarray[Any, Any] = load_LE.max(axis=1) / np.maximum(load_LE.mean(axis=1), 1e-12)
    return ratio_L


def _dead(load_LE: np.ndarray[Any, Any]) -> int:
    return int((load_LE < DEAD_SHARE * load_LE.mean(axis=1, keepdims=True)).sum())


def _text_tokens(rows: Sequence[Row], run: RunConfig) -> float:
    """Text tokens of a pair, as they were."""
    tokens = mean_of(rows, "perf/tokens_per_second") / mean_of(rows, "perf/samples_per_second")
    return max(0.0, tokens - run.model.num_patches)


def _scores(result: Mapping[str, Any]) -> dict[str, float]:
    """The retrieval and captions of one set, flat; percent."""
    flat = {
        f"{way}/{at}": value
        for way in ("image_to_text", "text_to_image")
        for at, value in result[way].items()
    }
    return flat | {
        "caption_exact": result["caption_exact"],
        "caption_tokens": result["caption_token_accuracy"],
    }
