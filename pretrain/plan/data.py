"""The data of a run: how much there is, how often it is read, and what becomes of some samples."""

from __future__ import annotations

from typing import Any

from data_pipeline.content.tokenizer import Tokenizer
from data_pipeline.loading.sources import distinct_names, make_order, open_sources
from data_pipeline.shards.patterns import expand_patterns
from data_pipeline.shards.run_indexing import needs_indexing
from pretrain.config.schema import RunConfig
from pretrain.plan.sample_check import check_some_samples


def plan_data(run: RunConfig, total_pairs: int) -> dict[str, Any]:
    """Tokenizer and sources of a run as JSON values; empty for a run that names none.

    Shards without a manifest are only listed: counting their samples would read them all.

    Args:
        run: A valid run.
        total_pairs: Pairs that its schedule reads.

    Raises:
        DataError: A manifest or the tokenizer cannot be read.
        ConfigError: The settings exclude every sample of a source.
    """
    tokenizer = Tokenizer.load(run.data.tokenizer) if run.data.tokenizer else None
    data: dict[str, Any] = {}
    if tokenizer is not None:
        data["tokenizer"] = {"path": run.data.tokenizer, "tokens": tokenizer.vocab_size}

    seconds = min(60.0, run.data.timeout_seconds)
    configs = run.data.sources
    unknown = [needs_indexing(config.shards, timeout_seconds=seconds) for config in configs]
    known = [config for config, is_unknown in zip(configs, unknown, strict=True) if not is_unknown]
    sources = open_sources(known, timeout_seconds=seconds)
    previews = check_some_samples(run, sources, tokenizer) if tokenizer else [None] * len(sources)
    # In a later phase the pairs of the earlier ones are not read again.
    epochs: list[float | None] = [None] * len(sources)
    if sources and not any(unknown) and run.data.phase == 1:
        order = make_order(sources, run.seed, run.data.shuffle_window)
        epochs = [consumed.epochs for consumed in order.consumed(total_pairs)]

    rows = iter(zip(sources, previews, epochs, strict=True))
    entries = []
    for config, name, is_unknown in zip(configs, distinct_names(configs), unknown, strict=True):
        if is_unknown:
            shards = len(expand_patterns([config.shards]))
            entries.append(_row(name, pairs=None, shards=shards, epochs=None))
            continue
        source, preview, times = next(rows)
        shards = len(source.manifest.shards)
        entries.append(_row(name, pairs=source.samples, shards=shards, epochs=times))
        if preview is not None:
            entries[-1] |= {
                "tried": preview.samples,
                "skipped": dict(preview.skipped),
                "truncated": preview.truncated,
                "mean_tokens": preview.tokens / max(1, preview.used),
            }
    return data | ({"sources": entries} if entries else {})


def _row(name: str, **values: float | None) -> dict[str, Any]:
    return {"name": name, **values, "tried": 0, "skipped": {}, "truncated": 0, "mean_tokens": None}
