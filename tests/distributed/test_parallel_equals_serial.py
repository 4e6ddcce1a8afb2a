"""DeepSpeed on one, two and four processes, compared with plain torch by `pretrain.check`."""

from __future__ import annotations

from collections.abc import Sequence

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


def grid(*expert_parallel_size: int, precisions: Sequence[Precision] = PRECISIONS) -> Cases:
    """Every ZeRO stage, with and without accumulation and activation checkpointing."""
    return [
        (
            "plain",
            Cell(
                expert_parallel_size=size,
                zero=zero,
                accumulation=accumulation,
                recompute=recompute,
                precision=precision,
                missing="none",
            ),
        )
        for size in expert_parallel_size
        for zero in STAGES
        for accumulation in (1, 4)
        for recompute in (False, True)
        for precision in precisions
    ]


CASES: dict[int, Cases] = {
    1: [
        *grid(1),
        ("plain", cell("2_offload", 1, 4)),
        # A micro-batch without pairs.
        ("plain", cell(0, 1, 4, "rank")),
        ("noisy", cell(0, 1, 4, recompute=True)),
        ("sampled", cell(3, 1, 2)),
        ("deepspeed-one", cell(0)),
        ("deepspeed", cell(1, 1, 4, recompute=True)),
    ],
    # With expert parallelism 2 there are two copies of the experts: gradients are summed inside
    # a copy and averaged over the copies.
    4: [
        *grid(4, precisions=("fp32",)),
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
        *grid(1, 2),
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
        ("deepspeed", cell(0, 2, 1, "pairs")),
        ("deepspeed-three", cell(1, 2, 2, recompute=True)),
        ("deepspeed", cell(2, 1, 1, "rank")),
        ("deepspeed-one", Cell(zero="1", expert_parallel_size=2, precision="bf16", missing="none")),
    ],
}
"""Runs and cells by world size."""


@pytest.fixture(
    scope="module", params=[1, 2, 4], ids=["one-process", "two-processes", "four-processes"]
)
def results(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> list[Outcome]:
    """Outcomes of all cells of a world size, from one launch: starting the ranks is slow."""
    world_size: int = request.param
    return run_cells(CASES[world_size], world_size, tmp_path_factory.mktemp(f"world-{world_size}"))


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
