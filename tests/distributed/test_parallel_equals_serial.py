"""DeepSpeed on one, two and four processes against plain torch in one process, by
`pretrain.check`."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from pretrain.check.cells import PRECISIONS, STAGES, Cell, Precision
from pretrain.check.compare import QUANTITIES
from pretrain.check.job import Outcome
from tests.support.parity_runs import ROUTING, outcomes, told

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]

Cases = list[tuple[str, Cell]]


def cell(
    zero: int | str,
    expert_parallel_size: int = 1,
    accumulation: int = 1,
    missing: str = "none",
    *,
    recompute: bool = False,
) -> Cell:
    """A cell in float32."""
    return Cell(
        zero=str(zero),
        expert_parallel_size=expert_parallel_size,
        accumulation=accumulation,
        recompute=recompute,
        missing=missing,
    )  # type: ignore[arg-type]


def grid(*expert_parallel_size: int, precisions: Sequence[Precision] = PRECISIONS) -> Cases:
    """Every stage, with and without accumulation and recomputation, in both number formats."""
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


def cases(world_size: int) -> Cases:
    """Runs and cells of a world."""
    if world_size == 1:
        return [
            *grid(1),
            ("plain", cell("2_offload", 1, 4)),
            # A micro-batch without a pair.
            ("plain", cell(0, 1, 4, "rank")),
            ("noisy", cell(0, 1, 4, recompute=True)),
            ("sampled", cell(3, 1, 2)),
            ("deepspeed-one", cell(0)),
            ("deepspeed", cell(1, 1, 4, recompute=True)),
        ]
    if world_size == 4:
        # Two copies of the experts: each expert's gradient is summed inside a copy and averaged
        # over the copies.
        return [
            *grid(4, precisions=("fp32",)),
            ("plain", cell(0, 2)),
            ("plain", cell(1, 2, 2)),
            ("plain", cell(3, 2)),
            ("plain", cell(2, 4, 1, "rank")),
            # Copies with rows and copies without any must add up their gradients in one order.
            ("plain", cell(2, 2, 1, "rank")),
            ("plain", cell(3, 1, 1, "rank")),
            ("plain", Cell(zero="1", expert_parallel_size=2, precision="bf16", missing="none")),
            ("noisy", cell(1, 2, 1, "pairs")),
            ("sampled", cell(2, 4)),
            ("pools", cell(0, 1, 2)),
        ]
    return [
        *grid(1, 2),
        ("plain", cell("2_offload", 2, 2)),
        ("plain", cell(1, 2, 1, "pairs")),
        ("plain", cell(2, 2, 2, "pairs")),
        # One rank has no pair at all and must still enter every exchange.
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
            for name in ("noisy_top_k", "sampled", "experts", "pools")
            for size in (1, 2)
        ),
        ("experts", cell(1, 2)),
        ("pools", cell(2, 2, 4, recompute=True)),
        # Elements of the router's gradient are nothing but rounding here, and Adam turns them
        # around.
        ("pools", cell(2, 2, 4, "pairs", recompute=True)),
        ("deepspeed", cell(0, 2, 1, "pairs")),
        ("deepspeed-three", cell(1, 2, 2, recompute=True)),
        ("deepspeed", cell(2, 1, 1, "rank")),
        ("deepspeed-one", Cell(zero="1", expert_parallel_size=2, precision="bf16", missing="none")),
    ]


@pytest.fixture(
    scope="module", params=[1, 2, 4], ids=["one-process", "two-processes", "four-processes"]
)
def found(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> list[Outcome]:
    """Outcomes of all cells of a world; one launch, since starting ranks costs more than training
    them."""
    world_size: int = request.param
    return outcomes(cases(world_size), world_size, tmp_path_factory.mktemp(f"world-{world_size}"))


def test_every_cell_equals_one_process(found: list[Outcome]) -> None:
    bad = [told(outcome) for outcome in found if outcome.status != "ok"]
    assert not bad, "\n".join(bad)


def test_every_quantity_was_compared_and_no_choice_differs(found: list[Outcome]) -> None:
    for outcome in found:
        assert set(outcome.worst) == set(QUANTITIES), told(outcome)
        later_too = outcome.cell.precision == "fp32"
        choices = [
            outcome.worst["choices"].value,
            outcome.worst["later-choices"].value if later_too else 0.0,
        ]
        assert choices == [0.0, 0.0], told(outcome)


def test_what_could_go_wrong_took_part(found: list[Outcome]) -> None:
    """Clipping, dropped choices and biases, wherever a run has them."""
    for outcome in found:
        moe, balance = ROUTING[outcome.run]
        if outcome.cell.terms == "all":  # the routers' gradients are too small to be clipped
            assert outcome.facts["clipped_steps"] == 3, told(outcome)
        assert (outcome.facts["dropped"] > 0) == ("capacity_factor" in moe), told(outcome)
        assert outcome.facts["biases_moved"] == ("bias" in balance), told(outcome)
