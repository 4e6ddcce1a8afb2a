"""DeepSpeed on one, two and four processes, compared with plain torch by `pretrain.check`."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from pretrain.check.cells import PRECISIONS, STAGES, Cell, Missing, Precision
from pretrain.check.compare import QUANTITIES
from pretrain.check.job import Outcome
from tests.support.parity_runs import RUN_SETTINGS, describe, run_cells

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]

Cases = list[tuple[str, Cell]]


def cell(
    zero: int | str,
    expert_parallel_size: int = 1,
    accumulation: int = 1,
    missing: Missing = "none",
    *,
    recompute: bool = False,
) -> Cell:
    """A float32 cell; positional: ZeRO stage, expert parallelism, micro-batches, missing pairs."""
    return Cell(
        zero=str(zero),
        expert_parallel_size=expert_parallel_size,
        accumulation=accumulation,
        recompute=recompute,
        missing=missing,
    )


def full_grid(*expert_parallel_size: int) -> Cases:
    """All combinations of stage, accumulation, activation checkpointing and precision."""
    return [
        ("plain", plain_cell(zero, size, accumulation, recompute, precision))
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
            cases.append(("plain", plain_cell(zero, size, accumulations[0], False, first)))
            cases.append(("plain", plain_cell(zero, size, accumulations[1], True, second)))
    return cases


def plain_cell(
    zero: str, size: int, accumulation: int, recompute: bool, precision: Precision
) -> Cell:
    """A cell of the grids."""
    return Cell(
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
        ("plain", cell("2_offload", 1, 4)),
        # A micro-batch without pairs.
        ("plain", cell(0, 1, 4, "rank")),
        ("noisy", cell(0, 1, 4, recompute=True)),
        ("sampled", cell(3, 1, 2)),
    ],
    # With expert parallelism 2 there are two copies of the experts: gradients are summed inside
    # a copy and averaged over the copies.
    4: [
        ("plain", cell(0, 4, 4, recompute=True)),
        ("plain", cell(1, 4, recompute=True)),
        ("plain", cell(3, 4, 4)),
        ("plain", cell(0, 2)),
        ("plain", cell(1, 2, 2)),
        ("plain", cell(3, 2)),
        ("plain", cell(2, 4, 1, "rank")),
        # A copy with pairs and a copy without must reduce their gradients in the same order.
        ("plain", cell(2, 2, 1, "rank")),
        ("plain", cell(3, 1, 1, "rank")),
        ("plain", Cell(zero="1", expert_parallel_size=2, precision="bf16", missing="none")),
        ("noisy", cell(1, 2, 1, "pairs")),
        ("sampled", cell(2, 4)),
        ("pools", cell(0, 1, 2)),
    ],
    2: [
        *pairwise_grid(1, 2),
        ("plain", cell("2_offload", 2, 2)),
        ("plain", cell(1, 2, 1, "pairs")),
        ("plain", cell(2, 2, 2, "pairs")),
        # One rank has no pairs and must still take part in every collective.
        ("plain", cell(1, 2, 1, "rank")),
        ("plain", cell(3, 2, 1, "rank")),
        ("sampled", cell(1, 2, 2, "rank")),
        ("plain", cell(2, 1, 1, "rank")),
        ("plain", cell(3, 1, 1, "rank")),
        ("noisy", cell(0, 2)),
        ("noisy", cell(3, 2, 2, "pairs", recompute=True)),
        ("sampled", cell(2, 1, 1, "pairs")),
        *(
            ("usual", Cell(expert_parallel_size=2, zero=zero, precision="bf16", terms="aux"))
            for zero in STAGES
        ),
        *(
            (name, Cell(expert_parallel_size=size, zero="1", precision="bf16", missing="pairs"))
            for name in ("noisy", "sampled", "experts", "pools")
            for size in (1, 2)
        ),
        ("experts", cell(1, 2)),
        ("pools", cell(2, 2, 4, recompute=True)),
        # Here some elements of the router's gradient are pure rounding error, which Adam scales up.
        ("pools", cell(2, 2, 4, "pairs", recompute=True)),
    ],
}
"""Runs and cells by world size."""

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
) -> list[Outcome]:
    """Outcomes of all cells of a world size, from one launch: starting the ranks is slow."""
    cases, world_size = request.param
    return run_cells(cases[world_size], world_size, tmp_path_factory.mktemp(f"world-{world_size}"))


def test_every_cell_equals_one_process(results: list[Outcome]) -> None:
    failures = [describe(outcome) for outcome in results if outcome.status != "ok"]
    assert not failures, "\n".join(failures)


def test_every_quantity_is_compared_and_no_assignment_differs(results: list[Outcome]) -> None:
    for outcome in results:
        assert set(outcome.worst) == set(QUANTITIES), describe(outcome)
        compare_later = outcome.cell.precision == "fp32"
        assignments = [
            outcome.worst["assignments"].value,
            outcome.worst["later-assignments"].value if compare_later else 0.0,
        ]
        assert assignments == [0.0, 0.0], describe(outcome)


def test_runs_clip_drop_and_update_biases(results: list[Outcome]) -> None:
    """Otherwise these features would not be covered."""
    for outcome in results:
        moe, balance = RUN_SETTINGS[outcome.run]
        if outcome.cell.terms == "all":  # gradients of the routers' terms alone are not clipped
            assert outcome.reference_stats["clipped_steps"] == 3, describe(outcome)
        assert (outcome.reference_stats["dropped"] > 0) == ("capacity_factor" in moe), describe(
            outcome
        )
        assert outcome.reference_stats["biases_moved"] == ("bias" in balance), describe(outcome)


def test_pairwise_grid_contains_every_pair_of_values() -> None:
    def pairs(cases: Cases) -> set[tuple[tuple[str, object], ...]]:
        rows = [sorted(dataclasses.asdict(cell).items()) for _, cell in cases]
        return {pair for row in rows for pair in itertools.combinations(row, 2)}

    assert pairs(pairwise_grid(1, 2)) == pairs(full_grid(1, 2))
