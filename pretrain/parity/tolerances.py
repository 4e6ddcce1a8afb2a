"""Tolerances: which differences between a case and the reference are mismatches.

The first step shows what is wrong; later steps only show that something was. Adam takes a full-size
step even where a gradient is nothing but rounding error, so weights diverge where a gradient is
close to 0: in bfloat16, later steps are not compared at all. Expert assignments are those of the
reference (`pretrain.parity.replay`); how many of its own assignments differ, as they do when two
experts have nearly equal scores (a tie), is compared apart.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass

from pretrain.parity.compare import Differences, largest

TOLERANCES: Mapping[str, Mapping[str, float]] = {
    "start": {"fp32": 0.0, "bf16": 0.0},
    "counts": {"fp32": 0.0, "bf16": 0.0},
    "loss": {"fp32": 1e-5, "bf16": 5e-3},
    # Worst seen in bfloat16: 1.3e-6.
    "term": {"fp32": 1e-5, "bf16": 5e-3},
    # Worst seen in bfloat16: 1.6e-3, because ZeRO 1 to 3 round gradients.
    "norm": {"fp32": 1e-5, "bf16": 5e-3},
    "statistics": {"fp32": 1e-5, "bf16": 5e-3},
    # Worst seen in bfloat16: 1.2e-2, a key norm.
    "gradient": {"fp32": 1e-5, "bf16": 2e-2},
    # Worst seen in bfloat16: 3.6e-3, with 4 micro-batches that ZeRO 1 to 3 accumulate in bfloat16.
    # Gradients accumulated in bfloat16 over 16 micro-batches give 4.6e-3 to 5.2e-3.
    "median-gradient": {"fp32": 1e-5, "bf16": 4e-3},
    # An element whose gradient is nothing but rounding error moves by a full Adam step in an
    # arbitrary direction. A missing or doubled step gives 1; 6 % of the elements moving in the
    # opposite direction give 0.5.
    "update": {"fp32": 2e-2, "bf16": 0.5},
    "biases": {"fp32": 1e-6, "bf16": 1e-6},
    "loads": {"fp32": 0.0, "bf16": 0.0},
    "assignments": {"fp32": 1e-4, "bf16": 5e-3},
    "parameters": {"fp32": 1e-3},
    "later": {"fp32": 1e-4},
    "later-loads": {"fp32": 0.0},
    "later-assignments": {"fp32": 1e-4},
    "later-biases": {"fp32": 1e-6},
    "later-parameters": {"fp32": 1e-3},
}
"""By quantity and precision; a quantity without a value is only
checked for infinite differences in that precision.

Of assignments, the fraction that may differ because of ties; one may always. See
`pretrain.parity.compare.QUANTITIES` for what each quantity is relative to.
"""
FIRST_FORWARD_BACKWARD = ("loss", "term", "norm", "statistics", "gradient", "median-gradient")
OTHER_ROUNDING_FACTORS = {"median-gradient": 4}
"""Factors of the bfloat16 tolerances of `FIRST_FORWARD_BACKWARD` if the MoE layers round at other
points than the reference; 2 for other quantities. Worst seen: 2.0e-2 in a gradient, 1.1e-2 in the
median, 4.3e-3 in the norm."""


@dataclass(frozen=True)
class Mismatch:
    """A difference above its tolerance."""

    quantity: str
    name: str
    """Of the term, weight or statistic with the largest difference."""
    value: float
    tolerance: float


def find_mismatches(
    differences: Differences,
    precision: str,
    num_assignments: float,
    *,
    other_rounding: bool = False,
) -> tuple[Mismatch, ...]:
    """The largest difference of each quantity that exceeds its tolerance.

    Args:
        differences: Differences of a case, merged over all ranks.
        precision: `fp32` or `bf16`.
        num_assignments: Expert assignments of all tokens in the first step.
        other_rounding: The case's MoE layers round intermediate results at other points than the
            reference does; looser tolerances of the first step in bfloat16.
    """
    mismatches = []
    for quantity, by_precision in TOLERANCES.items():
        if not differences.get(quantity):
            continue
        # What is not compared must still exist and be finite.
        tolerance = by_precision.get(precision, sys.float_info.max)
        if quantity.endswith("assignments"):
            tolerance = max(1.0, tolerance * num_assignments)
        if other_rounding and precision == "bf16" and quantity in FIRST_FORWARD_BACKWARD:
            tolerance *= OTHER_ROUNDING_FACTORS.get(quantity, 2)

        name, value = largest(differences, quantity)
        if not value <= tolerance:
            mismatches.append(Mismatch(quantity, name, value, tolerance))
    return tuple(mismatches)
