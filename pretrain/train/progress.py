"""The console line of a training step."""

from __future__ import annotations

from collections.abc import Iterator

from data_pipeline.common.logs import format_duration
from pretrain.config.schema import RunConfig
from pretrain.train.log_entry import LogEntry, Losses

LOSS_TERMS = ("contrastive", "caption", "balance", "router_z")


def progress_line(entry: LogEntry, run: RunConfig) -> str:
    """The console line of a log entry.

    Loss terms with weight 0 are omitted. The maximum expert load is that of all layers.
    """
    return "  ".join(_parts(entry, run))


def _parts(entry: LogEntry, run: RunConfig) -> Iterator[str]:
    throughput, total_steps = entry.throughput, run.schedule.total_steps
    yield f"step {entry.step}/{total_steps}"
    yield _loss(entry.losses)
    if entry.layers:
        max_load = max(layer.max_over_mean_load for layer in entry.layers)
        yield f"max/mean expert load {max_load:.2f}"
    yield f"lr {entry.learning_rate:.2e}"
    yield f"{throughput.samples_per_second:,.0f} samples/s"
    yield f"{throughput.tokens_per_second:,.0f} tokens/s"
    if filtered := sum(entry.data.filtered.values()):
        yield f"filtered {filtered:.0%}"
    seconds = throughput.seconds_per_step
    yield f"data wait {min(1.0, entry.data.wait_seconds / seconds):.0%}"
    yield f"{format_duration((total_steps - entry.step) * seconds)} left"


def _loss(losses: Losses) -> str:
    terms = [
        f"{name} {losses.terms[name]:.3f}"
        for name in LOSS_TERMS
        if name in losses.terms and losses.weighted[name] != 0
    ]
    total = f"loss {losses.total:.4f}"
    return f"{total} ({', '.join(terms)})" if terms else total
