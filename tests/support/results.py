"""Results of `Reader.read_many` in tests."""

from __future__ import annotations

from collections.abc import Sequence

from data_pipeline.samples import RawSample, SampleProblem


def problem_reasons(results: Sequence[RawSample | SampleProblem]) -> list[str]:
    """The reason of each problem; empty for a sample that was read."""
    return [result.reason if isinstance(result, SampleProblem) else "" for result in results]
