"""Differences between the traces of a case's ranks and the reference trace.

Which differences are too large is decided in `pretrain.parity.tolerances`.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from pretrain.parallel.tensor_names import split_name

QUANTITIES = (
    "start",
    "loss",
    "term",
    "norm",
    "gradient",
    "median-gradient",
    "statistics",
    "counts",
    "loads",
    "assignments",
    "biases",
    "parameters",
    "update",
    "later",
    "later-loads",
    "later-assignments",
    "later-biases",
    "later-parameters",
)
"""Compared quantities.

Of the first step: `start` are the initial weights, `loss` is the total, `term` every loss term
before and after weighting and the contrastive scale, `norm` the gradient norm before clipping,
`median-gradient` the median of `gradient` over all weights, `statistics` the routers' sums,
`counts` pairs and tokens, `loads` the assignments of each expert, which replay makes equal,
`assignments` how many the run itself would select otherwise, how many are kept and how many are
first, `biases` the routers' biases, `parameters` the weights after the step, and `update` the
difference of these weights relative to the norm of their change.

`later...` are the same quantities of later steps; `later` stands for all scalars.
"""

Differences = dict[str, dict[str, float]]
"""Differences by quantity and name of the term, weight or statistic.

Relative; absolute for biases; a count for assignments and counts; infinite for a NaN, a shape
mismatch or a missing tensor.
"""

MIN_UPDATE_ELEMENTS = 256
"""`update` ignores smaller weights, in which a few elements could dominate."""
MIN_TERM = 1e-2
"""Differences of smaller terms are relative to this value: such a term (an entropy shortfall, for
example) is the difference of much larger numbers."""
MIN_GRADIENT_RATIO = 1e-6
"""Differences of smaller gradients are relative to this fraction of the global gradient norm."""
UNSPLIT_END = 1 << 62
"""End of the range of a tensor that is not sharded over ranks."""


class Comparison:
    """Compares one rank's trace with the reference, one tensor at a time, without storing it."""

    def __init__(self, reference: Mapping[str, Tensor]) -> None:
        self._reference = _by_plain_name(reference)
        self._gradient_norm = float(reference["0/norm/norm"])
        self.differences: Differences = {}
        self.seen: list[str] = []
        """Names of the compared tensors."""

    def add(self, name: str, actual: Tensor) -> None:
        """Compare one tensor of the trace."""
        step, quantity, leaf = name.split("/", 2)
        self.seen.append(name)

        expected = _expected(name, self._reference)
        value = math.inf
        if expected is not None and expected.shape == actual.shape:
            value = _distance(quantity, actual.double(), expected.double(), self._gradient_norm)
        location = leaf if step in ("start", "0") else f"{leaf} (step {int(step) + 1})"
        self.differences.setdefault(_key(step, quantity), {})[location] = value
        if step == "0" and quantity == "parameters" and math.isfinite(value):
            self._add_update(name, leaf, actual)

    def _add_update(self, name: str, leaf: str, actual: Tensor) -> None:
        """Difference of a weight relative to the norm of its change in the first step."""
        end = _expected(name, self._reference)
        start = _expected(f"start/parameters/{leaf}", self._reference)
        if end is None or start is None or end.numel() < MIN_UPDATE_ELEMENTS:
            return

        update_norm = float((end.double() - start.double()).norm())
        min_norm = max(1e-6 * float(end.double().norm()), 1e-30)
        value = float((actual.double() - end.double()).norm()) / max(update_norm, min_norm)
        self.differences.setdefault("update", {})[leaf] = value


def compare_traces(actual: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> Differences:
    """Compare the whole trace of one process, which holds all experts, with the reference."""
    comparison = Comparison(reference)
    for name, tensor in actual.items():
        comparison.add(name, tensor)
    return merge_ranks([(comparison.differences, comparison.seen)], reference)


def merge_ranks(
    ranks: Iterable[tuple[Differences, Iterable[str]]], reference: Mapping[str, Tensor]
) -> Differences:
    """The differences of a case: the largest over ranks, and what no rank has.

    Args:
        ranks: `Comparison.differences` and `Comparison.seen` of every rank.
        reference: The reference trace.

    Returns:
        Quantities in the order of `QUANTITIES`, names by descending difference.
    """
    merged: Differences = {}
    reported: set[str] = set()
    for differences, seen in ranks:
        _merge(merged, differences)
        reported.update(seen)
    _merge(merged, _missing(reported, reference))

    if gradients := merged.get("gradient"):
        # Rounding that affects all weights, as gradients accumulated in bfloat16 do, shows in the
        # median even if it is smaller than the largest difference of a single weight.
        by_weight: dict[str, float] = {}
        for name, value in gradients.items():
            weight, _ = split_name(name)
            by_weight[weight] = max(value, by_weight.get(weight, 0.0))
        merged["median-gradient"] = {"all weights": statistics.median(by_weight.values())}
    return {
        quantity: dict(sorted(merged[quantity].items(), key=lambda item: (-item[1], item[0])))
        for quantity in QUANTITIES
        if quantity in merged
    }


def largest(differences: Differences, quantity: str) -> tuple[str, float]:
    """Name and value of the largest difference; `("", 0.0)` if there is none."""
    values = differences.get(quantity)
    return max(values.items(), key=lambda item: item[1]) if values else ("", 0.0)


def num_assignments(reference: Mapping[str, Tensor]) -> float:
    """Expert assignments of all tokens in the first step."""
    return float(reference["0/loads/experts"].sum())


def reference_stats(reference: Mapping[str, Tensor], clip_norm: float) -> dict[str, Any]:
    """Events in the reference's steps; shows whether clipping, dropping and biases were covered."""
    norms = [float(norm) for name, norm in reference.items() if name.endswith("/norm/norm")]
    dropped = sum(
        float((reference[f"{step}/loads/experts"] - kept).sum())
        for step in range(len(norms))
        for kept in [reference[f"{step}/assignments/kept"]]
    )
    biases = reference["0/biases/biases"]
    return {
        "pairs": int(reference["0/counts/pairs"]),
        "assignments": int(num_assignments(reference)),
        "dropped": int(dropped),
        "biases_moved": biases.numel() > 0 and all(bool(layer.any()) for layer in biases),
        "clipped_steps": sum(norm > clip_norm for norm in norms) if clip_norm else 0,
    }


def relative(actual: Tensor, expected: Tensor, min_norm: float = 1e-30) -> float:
    """||actual - expected|| / ||expected||; infinite if the result is NaN or infinite."""
    norm = float((actual.double() - expected.double()).norm())
    value = norm / max(float(expected.double().norm()), min_norm)
    return value if math.isfinite(value) else math.inf


def _merge(merged: Differences, differences: Differences) -> None:
    for quantity, by_name in differences.items():
        values = merged.setdefault(quantity, {})
        for name, value in by_name.items():
            values[name] = max(value, values.get(name, 0.0))


def _missing(seen: Iterable[str], reference: Mapping[str, Tensor]) -> Differences:
    """Tensors of the reference that no rank reported; of sharded experts, every one must be."""
    ranges: dict[str, list[tuple[int, int]]] = {}
    for name in seen:
        plain, experts = split_name(name)
        ranges.setdefault(plain, []).append(experts or (0, UNSPLIT_END))

    missing: Differences = {}
    for name, tensor in _by_plain_name(reference).items():
        step, quantity, leaf = name.split("/", 2)
        reported = ranges.get(name, [])
        gap = _first_gap(reported, tensor.shape[0] if tensor.dim() else 1)
        if gap is not None:
            description = f"missing: {leaf}" + (f" of expert {gap}" if reported else "")
            missing.setdefault(_key(step, quantity), {})[description] = math.inf
    return missing


def _first_gap(ranges: Iterable[tuple[int, int]], count: int) -> int | None:
    """The first index of 0..count-1 outside of all ranges."""
    reached = 0
    for first, end in sorted(ranges):
        if first > reached:
            break
        reached = max(reached, end)
    return reached if reached < count else None


def _distance(quantity: str, actual: Tensor, expected: Tensor, gradient_norm: float) -> float:
    if quantity == "gradient":
        return relative(actual, expected, MIN_GRADIENT_RATIO * gradient_norm)
    if quantity in ("parameters", "statistics", "norm"):
        return relative(actual, expected, 1e-12)

    difference = actual - expected
    if quantity == "assignments":
        # A token that changes its expert is one more for one expert and one less for another.
        per_layer = difference.flatten(1) if actual.dim() > 1 else difference
        added, removed = per_layer.clamp(min=0).sum(), (-per_layer).clamp(min=0).sum()
        value = max(float(added), float(removed))
    elif quantity in ("biases", "counts", "loads"):
        value = float(difference.abs().max()) if actual.numel() else 0.0
    else:
        value = float(difference.abs()) / max(float(expected.abs()), MIN_TERM)
    return value if math.isfinite(value) else math.inf


def _expected(name: str, reference: Mapping[str, Tensor]) -> Tensor | None:
    """The reference tensor of this name; for a shard of the experts, its slice."""
    plain, experts = split_name(name)
    expected = reference.get(plain)
    return expected if expected is None or experts is None else expected[slice(*experts)]


def _by_plain_name(reference: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by name without a range of experts: the reference holds all experts."""
    return {split_name(name)[0]: tensor for name, tensor in reference.items()}


def _key(step: str, quantity: str) -> str:
    """The entry of `QUANTITIES`."""
    if step == "start":
        return "start"
    if step == "0":
        return quantity
    return f"later-{quantity}" if f"later-{quantity}" in QUANTITIES else "later"
