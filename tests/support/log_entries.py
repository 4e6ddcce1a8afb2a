"""Log entries of a run with two MoE layers of four experts, without training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from pretrain.train.log_entry import (
    DataMetrics,
    LayerMetrics,
    LogEntry,
    Losses,
    ModalityMetrics,
    RouterMetrics,
    Throughput,
)

LOSSES = Losses(
    total=4.2,
    terms={"contrastive": 3.0, "caption": 0.6},
    weighted={"contrastive": 3.0, "caption": 1.2},
)


def log_entry(step: int = 1, *, total: float = 4.2, **changes: Any) -> LogEntry:
    """An entry of a dense run with this total loss."""
    entry = LogEntry(
        step=step,
        losses=replace(LOSSES, total=total),
        logit_scale=10.0,
        learning_rate=3e-4,
        grad_norm=1.5,
        throughput=Throughput(
            samples_per_second=396.2,
            tokens_per_second=21000.0,
            seconds_per_step=2.0,
            flops_per_second=1e12,
            memory_gib=3.0,
        ),
        data=DataMetrics(wait_seconds=0.1, samples_seen=64.0, epoch_position=64.0),
        layers=(),
    )
    return replace(entry, **changes)


def layer(
    block: int,
    loads: Mapping[str, Sequence[int]],
    router: RouterMetrics | None = None,
    **ratios: Any,
) -> LayerMetrics:
    """A layer with these assignments by modality."""
    modalities = {
        modality: ModalityMetrics(
            tokens_per_expert=tuple(load),
            max_over_mean_load=max(load) * len(load) / max(1, sum(load)),
            router=router
            or RouterMetrics(
                entropy=1.0 * block, mean_entropy=1.2, top_probability=0.5, top1_ratio=0.5
            ),
        )
        for modality, load in loads.items()
    }
    values: dict[str, Any] = {"max_over_mean_load": 1.0, "min_over_mean_load": 1.0} | ratios
    return LayerMetrics(block=block, modalities=modalities, **values)
