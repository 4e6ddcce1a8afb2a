"""Property tests: 100 examples in `make test`, 2,000 in the long suite."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis.strategies import SearchStrategy

num_examples = pytest.mark.parametrize(
    "examples", [100, pytest.param(2000, marks=[pytest.mark.long, pytest.mark.timeout(1200)])]
)
"""Parametrizes a test by the argument of `check_property`."""


def check_property(
    check: Callable[..., None], examples: int, *strategies: SearchStrategy[Any]
) -> None:
    """Call `check` with values of the strategies; the same values in every run."""
    limits = settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    limits(given(*strategies)(check))()
