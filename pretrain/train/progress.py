"""The console line of a training step."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from data_pipeline.common.logs import format_duration
from pretrain.config.schema import RunConfig

LOSS_TERMS = ("contrastive", "caption", "balance", "router_z")

_LAYER_LOAD = re.compile(r"moe/max_over_mean_load/layer_\d+")
"""Load metric of a layer over both modalities."""


def progress_line(step: int, metrics: Mapping[str, float], run: RunConfig) -> str:
    """The console line of a step.

    Parts without a metric are omitted, and so are loss terms with weight 0. The maximum expert load
    is that of all layers.
    """
    return "  ".join(_parts(step, metrics, run))


def _parts(step: int, metrics: Mapping[str, float], run: RunConfig) -> Iterator[str]:
    yield f"step {step}/{run.schedule.total_steps}"
    if "loss/total" in metrics:
        yield _loss(metrics)
    loads = [load for name, load in metrics.items() if _LAYER_LOAD.fullmatch(name)]
    if loads:
        yield f"max/mean expert load {max(loads):.2f}"
    if "optim/lr" in metrics:
        yield f"lr {metrics['optim/lr']:.2e}"
    if "perf/samples_per_second" in metrics:
        yield f"{metrics['perf/samples_per_second']:,.0f} samples/s"
    if "perf/tokens_per_second" in metrics:
        yield f"{metrics['perf/tokens_per_second']:,.0f} tokens/s"
    filtered = sum(ratio for name, ratio in metrics.items() if name.startswith("data/filtered/"))
    if filtered:
        yield f"filtered {filtered:.0%}"
    seconds = metrics.get("perf/seconds_per_step", 0.0)
    if seconds > 0:
        if "data/wait_seconds" in metrics:
            yield f"data wait {min(1.0, metrics['data/wait_seconds'] / seconds):.0%}"
        yield f"{format_duration((run.schedule.total_steps - step) * seconds)} left"


def _loss(metrics: Mapping[str, float]) -> str:
    terms = []
    for name in LOSS_TERMS:
        if f"loss/{name}" in metrics and metrics.get(f"loss/weighted/{name}") != 0:
            terms.append(f"{name} {metrics[f'loss/{name}']:.3f}")
    total = f"loss {metrics['loss/total']:.4f}"
    return f"{total} ({', '.join(terms)})" if terms else total
