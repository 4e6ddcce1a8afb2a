"""Comparison of two traces in `pretrain.parity`: differences and tolerances."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pretrain.parity.compare import (
    QUANTITIES,
    Comparison,
    compare_traces,
    largest,
    merge_ranks,
    relative,
)
from pretrain.parity.tolerances import find_mismatches
from tests.unit.pretrain.parity_support import (
    Change,
    changed_trace,
    make_trace,
    mismatches,
    move_assignments,
)


def test_equal_traces_have_no_mismatch() -> None:
    assert mismatches(make_trace()) == {} and mismatches(make_trace(), "bf16") == {}


@pytest.mark.parametrize(
    ("name", "change", "expected"),
    [
        ("start/parameters/w", lambda t: t * (1 + 1e-6), {"start": "w"}),
        ("0/loss/total", lambda t: t * (1 + 2e-5), {"loss": "total"}),
        ("0/term/balance", lambda t: t * (1 - 2e-5), {"term": "balance"}),
        # Differences of terms below MIN_TERM (1e-2) are relative to MIN_TERM.
        ("0/term/shortfall", lambda t: t + 2e-7, {"term": "shortfall"}),
        ("0/norm/norm", lambda t: t * (1 + 2e-5), {"norm": "norm"}),
        ("0/gradient/gate", lambda t: t * (1 + 2e-5), {"gradient": "gate"}),
        ("0/statistics/z", lambda t: 2 * t, {"statistics": "z"}),
        ("0/counts/pairs", lambda t: t - 1, {"counts": "pairs"}),
        ("0/loads/experts", move_assignments(1), {"loads": "experts"}),
        ("2/loads/experts", move_assignments(1), {"later-loads": "experts (step 3)"}),
        ("0/assignments/kept", move_assignments(2), {"assignments": "kept"}),
        ("0/assignments/kept", lambda t: 2 * t, {"assignments": "kept"}),
        ("0/biases/biases", lambda t: t + 1e-5, {"biases": "biases"}),
        ("0/parameters/w", lambda t: t * (1 + 2e-3), {"parameters": "w"}),
        ("0/parameters/w", lambda t: t * (1 + 2e-2), {"parameters": "w", "update": "w"}),
        ("1/loss/total", lambda t: t * (1 + 2e-4), {"later": "total (step 2)"}),
        ("2/norm/norm", lambda t: t * math.nan, {"later": "norm (step 3)"}),
        ("2/parameters/w", lambda t: t * (1 + 2e-3), {"later-parameters": "w (step 3)"}),
        ("2/biases/biases", lambda t: t - 1e-5, {"later-biases": "biases (step 3)"}),
        ("0/gradient/gate", lambda t: t * math.nan, {"gradient": "gate"}),
        ("0/gradient/gate", lambda t: t[:2], {"gradient": "gate"}),
    ],
)
def test_a_mismatch_names_the_quantity(name: str, change: Change, expected: dict[str, str]) -> None:
    assert mismatches(changed_trace(name, change)) == expected


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("0/loss/total", lambda t: t * (1 + 5e-6)),
        ("0/gradient/gate", lambda t: t * (1 - 5e-6)),
        ("1/loss/total", lambda t: t * (1 + 5e-5)),
        ("0/term/shortfall", lambda t: t + 5e-8),
    ],
)
def test_rounding_is_within_tolerance(name: str, change: Change) -> None:
    assert mismatches(changed_trace(name, change)) == {}


def test_a_shard_of_the_experts_is_compared_with_the_same_slice() -> None:
    reference, actual = make_trace(), make_trace()
    full = actual.pop("0/gradient/a.experts.w1@0:4")
    actual["0/gradient/a.experts.w1@2:4"] = full[2:4]
    gradients = compare_traces(actual, reference)["gradient"]
    others = {"gate": 0.0, "stem": 0.0, "head": 0.0}
    others["missing: a.experts.w1 of expert 0"] = math.inf
    assert gradients == {"a.experts.w1@2:4": 0.0} | others

    actual["0/gradient/a.experts.w1@2:4"] = full[0:2]
    expected = relative(full[0:2], full[2:4])
    gradients = compare_traces(actual, reference)["gradient"]
    assert gradients == {"a.experts.w1@2:4": pytest.approx(expected)} | others


def test_a_missing_or_additional_gradient_is_a_mismatch() -> None:
    actual = make_trace()
    del actual["0/gradient/gate"]
    assert mismatches(actual) == {"gradient": "missing: gate"}
    assert mismatches(make_trace() | {"0/gradient/new": torch.ones(1)}) == {"gradient": "new"}


@pytest.mark.parametrize(
    ("ranges", "missing_expert"),
    [
        ([(0, 2), (2, 4)], None),
        ([(1, 4), (0, 2)], None),
        ([(0, 2)], 2),
        ([(0, 1), (2, 4)], 1),
        ([(2, 4)], 0),
    ],
)
def test_experts_that_no_rank_reports_are_a_mismatch(
    ranges: list[tuple[int, int]], missing_expert: int | None
) -> None:
    actual = make_trace()
    full = actual.pop("0/gradient/a.experts.w1@0:4")
    for first, end in ranges:
        actual[f"0/gradient/a.experts.w1@{first}:{end}"] = full[first:end]
    expected = {"gradient": f"missing: a.experts.w1 of expert {missing_expert}"}
    assert mismatches(actual) == ({} if missing_expert is None else expected)


def test_weights_are_compared_relative_to_their_update() -> None:
    """The weights change from 1 to 2; in bfloat16, a third of the update may be Adam's rounding."""

    def with_weights(value: float) -> dict[str, Tensor]:
        return changed_trace("0/parameters/w", lambda w: torch.full_like(w, value))

    assert mismatches(with_weights(1.67), "bf16") == {}
    assert mismatches(with_weights(1.0), "bf16") == {"update": "w"}
    assert mismatches(with_weights(3.0), "bf16") == {"update": "w"}
    assert mismatches(with_weights(1.999)) == {}
    assert mismatches(with_weights(1.97)) == {"parameters": "w", "update": "w"}


def test_bfloat16_compares_the_first_step_with_larger_tolerances() -> None:
    assert mismatches(changed_trace("0/gradient/gate", lambda t: t * 1.01), "bf16") == {}
    assert mismatches(changed_trace("0/gradient/gate", lambda t: t * 1.03), "bf16") == {
        "gradient": "gate"
    }
    assert mismatches(changed_trace("2/loss/total", lambda t: t * 2), "bf16") == {}


def test_other_rounding_has_larger_tolerances_in_bfloat16() -> None:
    actual = changed_trace("0/gradient/gate", lambda t: t * 1.03)
    worst = compare_traces(actual, make_trace())
    assert not find_mismatches(worst, "bf16", 200.0, other_rounding=True)
    assert find_mismatches(worst, "fp32", 200.0, other_rounding=True)


def test_rounding_of_most_gradients_is_a_mismatch() -> None:
    def found(*gradients: float) -> list[str]:
        reference = {f"0/gradient/{index}": torch.ones(1) for index in range(len(gradients))}
        reference["0/norm/norm"] = torch.tensor(1.0)
        actual = {f"0/gradient/{i}": torch.ones(1) + g for i, g in enumerate(gradients)}
        differences = compare_traces(reference | actual, reference)
        return [mismatch.quantity for mismatch in find_mismatches(differences, "bf16", 200.0)]

    assert found(1e-2, 1e-3, 1e-3) == []
    assert found(5e-3, 5e-3, 0.0) == ["median-gradient"]


def test_few_assignments_may_differ_but_nothing_else() -> None:
    """Two experts with nearly equal scores are a tie, which rounding decides."""
    actual = changed_trace("0/assignments/kept", move_assignments(3))
    worst = compare_traces(actual, make_trace())
    assert find_mismatches(worst, "fp32", 1e5) == ()
    found = find_mismatches(worst, "fp32", 200.0)
    assert [mismatch.quantity for mismatch in found] == ["assignments"]

    actual["0/gradient/gate"] = make_trace()["0/gradient/gate"] * (1 + 1e-3)
    worst = compare_traces(actual, make_trace())
    found = find_mismatches(worst, "fp32", 1e5)
    assert [mismatch.quantity for mismatch in found] == ["gradient"]


def test_one_assignment_may_always_differ() -> None:
    for step, quantity in (("0", "assignments"), ("1", "later-assignments")):
        for count, expected in ((1, []), (2, [quantity])):
            actual = changed_trace(f"{step}/assignments/kept", move_assignments(count))
            worst = compare_traces(actual, make_trace())
            found = find_mismatches(worst, "fp32", 200.0)
            assert [mismatch.quantity for mismatch in found] == expected


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("value", [math.nan, math.inf, None])
@pytest.mark.parametrize("name", ["0/parameters/w", "1/loss/total", "2/parameters/w"])
def test_what_is_infinite_or_missing_is_a_mismatch_in_any_precision(
    name: str, value: float | None, precision: str
) -> None:
    actual = make_trace()
    actual[name] = actual[name] * (math.nan if value is None else value)
    if value is None:
        del actual[name]
    found = mismatches(actual, precision)
    assert len(found) == 1 and ("missing" in str(found)) == (value is None)


@pytest.mark.parametrize("worse", [0, 1])
def test_the_largest_difference_over_ranks_counts(worse: int) -> None:
    reference = make_trace()
    ranks = []
    for rank in (0, 1):
        actual = make_trace()
        if rank == worse:
            actual["0/gradient/gate"] *= 1.5
        comparison = Comparison(reference)
        for name, tensor in actual.items():
            comparison.add(name, tensor)
        ranks.append((comparison.differences, comparison.seen))
    merged = merge_ranks(ranks, reference)
    assert merged["gradient"]["gate"] == pytest.approx(0.5)
    assert next(iter(merged["gradient"])) == "gate"


def test_experts_are_complete_if_the_ranks_have_all_of_them() -> None:
    reference = make_trace()
    full = reference["0/gradient/a.experts.w1@0:4"]
    ranks = []
    for first in (0, 2):
        actual = make_trace()
        del actual["0/gradient/a.experts.w1@0:4"]
        actual[f"0/gradient/a.experts.w1@{first}:{first + 2}"] = full[first : first + 2]
        comparison = Comparison(reference)
        for name, tensor in actual.items():
            comparison.add(name, tensor)
        ranks.append((comparison.differences, comparison.seen))
    assert largest(merge_ranks(ranks, reference), "gradient")[1] == 0
    assert largest(merge_ranks(ranks[:1], reference), "gradient")[1] == math.inf


@pytest.mark.parametrize(
    ("precision", "quantities", "value"),
    [
        ("fp32", ("loss", "term", "norm", "statistics", "gradient", "median-gradient"), 3e-5),
        ("fp32", ("later",), 3e-4),
        ("fp32", ("parameters", "later-parameters"), 3e-3),
        ("fp32", ("update",), 0.05),
        ("fp32", ("biases", "later-biases"), 3e-6),
        ("fp32", ("start", "counts", "loads", "later-loads"), 1e-9),
        ("fp32", ("assignments", "later-assignments"), 2),
        ("bf16", ("loss", "term", "norm", "statistics", "median-gradient"), 0.01),
        ("bf16", ("gradient",), 0.05),
        ("bf16", ("update",), 0.9),
        ("bf16", ("biases",), 3e-6),
        ("bf16", ("start", "counts", "loads"), 1e-9),
        ("bf16", ("assignments",), 2),
    ],
)
def test_smallest_differences_that_are_mismatches(
    precision: str, quantities: tuple[str, ...], value: float
) -> None:
    for quantity in quantities:
        assert quantity in QUANTITIES
        found = find_mismatches({quantity: {"name": value}}, precision, 200.0)
        assert [mismatch.quantity for mismatch in found] == [quantity]
