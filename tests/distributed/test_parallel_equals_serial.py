"""DeepSpeed on one, two and four processes, compared with plain torch by `pretrain.parity`."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from pretrain.parity.cases import PRECISIONS, STAGES, Case, Missing, Precision
from pretrain.parity.compare import QUANTITIES, largest
from pretrain.parity.job import Result
from tests.support.parity_runs import RUN_SETTINGS, describe, run_cases

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]

Cases = list[Case]


def case(
    run: str,
    zero: int | str,
    expert_parallel_size: int = 1,
    accumulation: int = 1,
    missing: Missing = "none",
    *,
    recompute: bool = False,
) -> Case:
    """A float32 case; positional: run, stage, expert parallelism, micro-batches, missing pairs."""
    return Case(
        run=run,
        zero=str(zero),
        expert_parallel_size=expert_parallel_size,
        accumulation=accumulation,
        recompute=recompute,
        missing=missing,
    )


def full_grid(*expert_parallel_size: int) -> Cases:
    """All combinations of stage, accumulation, activation checkpointing and precision."""
    return [
        plain_case(zero, size, accumulation, recompute, precision)
        for size in expert_parallel_size
        for zero in STAGES
        for accumulation in (1, 4)
        for recompute in (False, True)
        for precision in PRECISIONS
    ]


def pairwise_grid(*expert_parallel_size: int) -> Cases:
    """A quarter of `full_grid` that contains every pair of values of two of its settings."""
    cases = []
    for size in expert_parallel_size:
        for index, zero in enumerate(STAGES):
            first, second = PRECISIONS if index % 2 == 0 else reversed(PRECISIONS)
            # The two rows of a stage differ in all three other settings.
            accumulations = (1, 4) if index < 2 else (4, 1)
            cases.append(plain_case(zero, size, accumulations[0], False, first))
            cases.append(plain_case(zero, size, accumulations[1], True, second))
    return cases


def plain_case(
    zero: str, size: int, accumulation: int, recompute: bool, precision: Precision
) -> Case:
    """A case of the grids."""
    return Case(
        run="plain",
        expert_parallel_size=size,
        zero=zero,
        accumulation=accumulation,
        recompute=recompute,
        precision=precision,
        missing="none",
    )


CASES: dict[int, Cases] = {
    1: [
        *pairwise_grid(1),
        case("plain", "2_offload", 1, 4),
        # A micro-batch without pairs.
        case("plain", 0, 1, 4, "rank"),
        case("noisy", 0, 1, 4, recompute=True),
        case("sampled", 3, 1, 2),
    ],
    # With expert parallelism 2 there are two copies of the experts: gradients are summed inside
    # a copy and averaged over the copies.
    4: [
        case("plain", 0, 4, 4, recompute=True),
        case("plain", 1, 4, recompute=True),
        case("plain", 3, 4, 4),
        case("plain", 0, 2),
        case("plain", 1, 2, 2),
        case("plain", 3, 2),
        case("plain", 2, 4, 1, "rank"),
        # A copy with pairs and a copy without must reduce their gradients in the same order.
        case("plain", 2, 2, 1, "rank"),
        case("plain", 3, 1, 1, "rank"),
        Case(run="plain", zero="1", expert_parallel_size=2, precision="bf16", missing="none"),
        case("noisy", 1, 2, 1, "pairs"),
        case("sampled", 2, 4),
        case("pools", 0, 1, 2),
    ],
    2: [
        *pairwise_grid(1, 2),
        case("plain", "2_offload", 2, 2),
        case("plain", 1, 2, 1, "pairs"),
        case("plain", 2, 2, 2, "pairs"),
        # One rank has no pairs and must still take part in every collective.
        case("plain", 1, 2, 1, "rank"),
        case("plain", 3, 2, 1, "rank"),
        case("sampled", 1, 2, 2, "rank"),
        case("plain", 2, 1, 1, "rank"),
        case("plain", 3, 1, 1, "rank"),
        case("noisy", 0, 2),
        case("noisy", 3, 2, 2, "pairs", recompute=True),
        case("sampled", 2, 1, 1, "pairs"),
        *(
            Case(run="usual", expert_parallel_size=2, zero=zero, precision="bf16", terms="aux")
            for zero in STAGES
        ),
        *(
            Case(run=name, expert_parallel_size=size, zero="1", precision="bf16", missing="pairs")
            for name in ("noisy", "sampled", "experts", "pools")
            for size in (1, 2)
        ),
        case("experts", 1, 2),
        case("pools", 2, 2, 4, recompute=True),
        # Here some elements of the router's gradient are pure rounding error, which Adam scales up.
        case("pools", 2, 2, 4, "pairs", recompute=True),
    ],
}
"""Runs and cases by world size."""

FULL_CASES = {1: full_grid(1), 2: full_grid(1, 2), 4: full_grid(4)}
"""All combinations; takes minutes, so `make test` leaves them out."""


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((CASES, 1), id="one-process"),
        pytest.param((CASES, 2), id="two-processes"),
        pytest.param((CASES, 4), id="four-processes"),
        pytest.param((FULL_CASES, 1), id="full-one-process", marks=pytest.mark.long),
        pytest.param((FULL_CASES, 2), id="full-two-processes", marks=pytest.mark.long),
        pytest.param((FULL_CASES, 4), id="full-four-processes", marks=pytest.mark.long),
    ],
)
def results(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> list[Result]:
    """Results of all cases of a world size, from one launch: starting the ranks is slow."""
    cases, world_size = request.param
    return run_cases(cases[world_size], world_size, tmp_path_factory.mktemp(f"world-{world_size}"))


def test_every_case_equals_one_process(results: list[Result]) -> None:
    failures = [describe(result) for result in results if result.status != "ok"]
    assert not failures, "\n".join(failures)


def test_every_quantity_is_compared_and_no_assignment_differs(results: list[Result]) -> None:
    for result in results:
        assert set(result.differences) == set(QUANTITIES), describe(result)
        compare_later = result.case.precision == "fp32"
        assignments = [
            largest(result.differences, "assignments")[1],
            largest(result.differences, "later-assignments")[1] if compare_later else 0.0,
        ]
        assert assignments == [0.0, 0.0], describe(result)


def test_runs_clip_drop_and_update_biases(results: list[Result]) -> None:
    """Otherwise these features would not be covered."""
    for result in results:
        moe, balance = RUN_SETTINGS[result.case.run]
        if result.case.terms == "all":  # gradients of the routers' terms alone are not clipped
            assert result.reference_stats["clipped_steps"] == 3, describe(result)
        assert (result.reference_stats["dropped"] > 0) == ("capacity_factor" in moe), describe(
            result
        )
        assert result.reference_stats["biases_moved"] == ("bias" in balance), describe(result)


def test_pairwise_grid_contains_every_pair_of_values() -> None:
    def pairs(cases: Cases) -> set[tuple[tuple[str, object], ...]]:
        rows = [sorted(dataclasses.asdict(case).items()) for case in cases]
        return {pair for row in rows for pair in itertools.combinations(row, 2)}

    assert pairs(pairwise_grid(1, 2)) == pairs(full_grid(1, 2))
