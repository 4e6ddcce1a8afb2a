"""The console line of a training step."""

from __future__ import annotations

from collections.abc import Iterator

from data_pipeline.common.logs import format_duration
from pretrain.config.schema import RunConfig
from pretrain.train.log_entry import LayerMetrics, LogEntry, Losses

_MIN_OTHER = 5e-4
"""Smaller sums of auxiliary terms are not shown; they would be printed as 0.000."""
_MIN_TRUNCATED = 0.005
"""Smaller fractions of truncated captions are not shown; they would be printed as 0%."""


def progress_line(entry: LogEntry, run: RunConfig) -> str:
    """The console line of a log entry.

    The total loss is the sum of the terms times their weights; terms with weight 0 are omitted and
    small ones are one number. The maximum expert load is that of all layers. An expert is dead if
    it had no token since the last line.
    """
    return "  ".join(_parts(entry, run))


def _parts(entry: LogEntry, run: RunConfig) -> Iterator[str]:
    throughput, total_steps = entry.throughput, run.schedule.total_steps
    yield f"step {entry.step}/{total_steps}"
    yield _loss(entry.losses)
    if entry.layers:
        max_load = max(layer.max_over_mean_load for layer in entry.layers)
        yield f"max/mean expert load {max_load:.2f}"
        if num_dead := sum(map(_num_dead, entry.layers)):
            yield f"dead experts {num_dead}/{len(entry.layers) * run.moe.num_experts}"
    if entry.skipped_updates:
        yield f"skipped updates {entry.skipped_updates}"
    yield f"lr {entry.learning_rate:.2e}"
    yield f"{throughput.samples_per_second:,.0f} samples/s"
    yield f"{throughput.tokens_per_second:,.0f} tokens/s"
    if filtered := sum(entry.data.filtered.values()):
        yield f"filtered {filtered:.0%}"
    if entry.data.truncated >= _MIN_TRUNCATED:
        yield f"truncated captions {entry.data.truncated:.0%}"
    seconds = throughput.seconds_per_step
    yield f"data wait {min(1.0, entry.data.wait_seconds / seconds):.0%}"
    yield f"{format_duration((total_steps - entry.step) * seconds)} left"


def _num_dead(layer: LayerMetrics) -> int:
    """Experts without a token of any modality."""
    loads = [metrics.tokens_per_expert for metrics in layer.modalities.values()]
    return sum(not any(expert) for expert in zip(*loads, strict=True))


def _loss(losses: Losses) -> str:
    """`loss 5.2110 = contrastive 2.071 + 2 x caption 1.565 + others 0.010`."""
    terms, others = [], 0.0
    for name, weighted in losses.weighted.items():
        value = losses.terms[name]
        if abs(weighted) < _MIN_OTHER or not value:
            others += weighted
        else:
            factor = f"{weighted / value:.3g}"
            terms.append(
                f"{name} {value:.3f}" if factor == "1" else f"{factor} x {name} {value:.3f}"
            )
    if abs(others) >= _MIN_OTHER:
        terms.append(f"others {others:.3f}")
    return " = ".join([f"loss {losses.total:.4f}", *([" + ".join(terms)] if terms else [])])
