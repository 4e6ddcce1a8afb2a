"""A look at some samples of every source before training starts."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from data_pipeline.common.errors import ConfigError
from data_pipeline.common.escaping import escape_control
from data_pipeline.common.tables import truncate
from data_pipeline.content.tokenizer import Tokenizer
from data_pipeline.loading.batch_spec import BatchSpec
from data_pipeline.loading.preview import SourcePreview, preview_source
from data_pipeline.loading.sources import Source
from pretrain.config.schema import RunConfig

logger = logging.getLogger(__name__)

MAX_TRUNCATED_RATIO = 0.01
"""More captions than this that are truncated to the context length are logged."""


def check_some_samples(
    run: RunConfig, sources: Sequence[Source], tokenizer: Tokenizer
) -> list[SourcePreview | None]:
    """Log what is skipped and truncated in some samples of each source.

    Args:
        run: The run.
        sources: Its sources.
        tokenizer: Its tokenizer.

    Returns:
        What became of the samples of each source; None for a source without samples.

    Raises:
        ConfigError: The settings exclude every sample of a source.
        StorageError: The store of a source does not respond.
    """
    batch = BatchSpec(
        image_size=run.model.image_size,
        context_length=run.model.context_length,
        micro_batch_size=run.batch.micro_batch_size,
    )
    previews: list[SourcePreview | None] = []
    for source in sources:
        preview = None
        if source.manifest.total_samples:
            preview = preview_source(source, run.data, tokenizer=tokenizer, batch=batch)
            _report(preview, run.data.max_filtered_ratio, run.model.context_length)
        previews.append(preview)
    return previews


def _report(preview: SourcePreview, max_ratio: float, context_length: int) -> None:
    reasons = ", ".join(f"{reason} {count}" for reason, count in preview.skipped.most_common())
    example = truncate(escape_control(preview.example), 200)
    message = (
        f"source {preview.name}: {preview.skipped.total()} of {preview.samples} samples that were "
        f"tried are skipped ({reasons}; the first: {example})"
    )
    if preview.is_unusable:
        raise ConfigError(
            f"{message}. Filters, caption_keys and image_keys can be set for this source alone, in "
            f"its section of data.train; `vlmoe data peek` shows its samples"
        )
    if preview.skipped_ratio > max_ratio:
        logger.warning("%s; more than data.max_filtered_ratio (%g)", message, max_ratio)
    if preview.truncated > MAX_TRUNCATED_RATIO * preview.used:
        logger.warning(
            "source %s: %d of %d captions have more than model.context_length (%d) tokens and "
            "are truncated",
            preview.name,
            preview.truncated,
            preview.used,
            context_length,
        )
