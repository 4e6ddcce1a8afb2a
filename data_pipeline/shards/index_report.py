"""What `vlmoe data index` reports about the shards that it read."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence

from data_pipeline.common import storage
from data_pipeline.common.errors import DataError
from data_pipeline.common.escaping import escape_control
from data_pipeline.common.tables import counted, join_counts
from data_pipeline.shards.index_job import IndexJob, IndexResult

logger = logging.getLogger(__name__)


def report(jobs: Sequence[IndexJob], results: Sequence[IndexResult | None]) -> None:
    """Log which indices were reused, what is corrupt, and how many files are in samples.

    Raises:
        DataError: Shards could not be indexed.
    """
    if reused := sum(bool(result and result.reused) for result in results):
        logger.info("reused the existing index of %d of %d shards", reused, len(jobs))
    for job, result in zip(jobs, results, strict=True):
        if result and result.entry and result.entry.corruption:
            logger.warning(
                "%s: salvaged %d samples; lost: %s",
                storage.redact(job.url),
                result.entry.samples,
                result.entry.corruption,
            )

    _report_empty_shards(jobs, results)
    _report_sample_problems(jobs, results)
    problems = [result.problem for result in results if result and result.problem]
    if not problems:
        _report_files([result for result in results if result])
        return
    if len(jobs) == 1:
        raise DataError(problems[0])
    not_tried = sum(result is None for result in results)
    count = f" ({not_tried} not tried)" if not_tried else ""
    listing = "\n  ".join(problems)
    raise DataError(
        f"{len(problems)} of {len(jobs)} shards cannot be indexed{count}:\n  {listing}\n"
        f"Repair or exclude these shards, or keep the readable samples of corrupt shards with "
        f"`vlmoe data index --salvage`. Indexed shards are not read again"
    )


def report_other_files(num_shards: int, ignored: dict[str, int]) -> None:
    """Log how many files beside the shards are not used, by rule."""
    if ignored:
        logger.info(
            "beside %s: %s ignored (%s)",
            counted(num_shards, "shard"),
            counted(sum(ignored.values()), "file"),
            join_counts(ignored),
        )


def _report_sample_problems(
    jobs: Sequence[IndexJob], results: Sequence[IndexResult | None]
) -> None:
    """Log how many samples training cannot use because they have no unique image."""
    counts: Counter[str] = Counter()
    examples: dict[str, str] = {}
    for job, result in zip(jobs, results, strict=True):
        for reason, (count, example) in (result.sample_problems if result else {}).items():
            counts[reason] += count
            examples.setdefault(reason, f"{storage.redact(job.url)} {example}")
    for reason, count in counts.most_common():
        logger.warning(
            "%s: %s skipped in training; the first: %s",
            reason,
            counted(count, "sample is", "samples are"),
            escape_control(examples[reason]),
        )


def _report_empty_shards(jobs: Sequence[IndexJob], results: Sequence[IndexResult | None]) -> None:
    empty = [
        job.url
        for job, result in zip(jobs, results, strict=True)
        if result and result.entry and not result.entry.samples and not result.entry.corruption
    ]
    if empty:
        logger.warning(
            "without files: %s; the first: %s",
            counted(len(empty), "shard"),
            storage.redact(empty[0]),
        )


def _report_files(results: Sequence[IndexResult]) -> None:
    """Log how many files are in samples, and how many are ignored by which rule."""
    ignored: Counter[str] = Counter()
    for result in results:
        ignored.update(result.ignored or {})
    unknown = sum(result.ignored is None for result in results)
    logger.info(
        "files: %s in samples, %s ignored%s%s",
        f"{sum(result.files for result in results):,}",
        f"{sum(ignored.values()):,}",
        f" ({join_counts(ignored)})" if ignored else "",
        f"; ignored files not counted in {counted(unknown, 'reused index', 'reused indices')}"
        if unknown
        else "",
    )
