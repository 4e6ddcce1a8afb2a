"""Reads samples in tests, and describes the results."""

from __future__ import annotations

from collections.abc import Sequence

from data_pipeline.common.errors import DataError
from data_pipeline.reading.reader import Reader
from data_pipeline.samples import RawSample, SampleProblem, SampleRef


def read_many(
    reader: Reader, locations: Sequence[tuple[int, int]]
) -> list[RawSample | SampleProblem]:
    """Samples by the index of their shard and their index in the shard."""
    return reader.read_many([SampleRef(0, shard, sample) for shard, sample in locations])


def read_one(reader: Reader, shard: int, sample: int) -> RawSample:
    """One sample; raises a DataError if it has a problem."""
    (result,) = read_many(reader, [(shard, sample)])
    if isinstance(result, SampleProblem):
        raise DataError(result.detail, slug=result.reason)
    return result


def problem_reasons(results: Sequence[RawSample | SampleProblem]) -> list[str]:
    """The reason of each problem; empty for a sample that was read."""
    return [result.reason if isinstance(result, SampleProblem) else "" for result in results]
