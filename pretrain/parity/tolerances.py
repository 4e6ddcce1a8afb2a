"""Tolerances: which differences between a trace and the reference are mismatches.

The first step shows what is wrong; later steps only show that something was. Adam takes a full-size
step even where a gradient is nothing but rounding error, so weights diverge where a gradient is
close to 0. Expert assignments are those of the reference (`pretrain.parity.replay`); how many of
its own assignments differ, as they do when two experts have nearly equal scores (a tie), is
compared apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from pretrain.parity.compare import Difference

FIRST_STEP_TOLERANCE = {"fp32": 1e-5, "bf16": 5e-3}
"""Of losses, terms, gradient norm and statistics in the first step.

Worst seen in bfloat16: 1.3e-6 in a term, 1.6e-3 in the norm (ZeRO 1 to 3 round gradients).
"""
GRADIENT_TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2}
"""Of every gradient of the first step. Worst seen in bfloat16: 1.2e-2, a key norm."""
MEDIAN_GRADIENT_TOLERANCE = {"fp32": 1e-5, "bf16": 4e-3}
"""Of the median over weights of the differences of gradients.

Worst seen in bfloat16: 3.6e-3 (4 micro-batches that ZeRO 1 to 3 accumulate in bfloat16). Gradients
accumulated in bfloat16 over 16 micro-batches give 4.6e-3 to 5.2e-3.
"""
OTHER_ROUNDING_FACTOR = {"gradient": 2, "median-gradient": 4}
"""Factors of the bfloat16 tolerances if the MoE layers round at other points than the reference;
2 for other quantities. Worst seen: 2.0e-2 in a gradient, 1.1e-2 in the median, 4.3e-3 in the norm.
"""
LATER_TOLERANCE = 1e-4
"""Of losses, terms and gradient norms after the first step, in float32.

Bfloat16 is compared in the first step only: its rounding changes weights whose gradient is close to
0 by a full Adam step.
"""
WEIGHT_TOLERANCE = 1e-3
"""Of weights after a step, in float32."""
UPDATE_TOLERANCE = {"fp32": 2e-2, "bf16": 0.5}
"""Of weights after the first step, relative to the norm of their change.

An element whose gradient is nothing but rounding error moves by a full Adam step in an arbitrary
direction, so a tolerance relative to the weights alone is not sufficient. A missing or doubled step
gives 1; 6 % of the elements moving in the opposite direction give 0.5.
"""
BIAS_TOLERANCE = 1e-6
"""Absolute. Biases follow from the numbers of assignments alone."""
MAX_TIE_FRACTION = {"fp32": 1e-4, "bf16": 5e-3}
"""Fraction of the assignments that may differ because of ties; one may always."""


class Mismatch(NamedTuple):
    """A difference above its tolerance."""

    quantity: str
    value: float
    name: str
    tolerance: float


def find_mismatches(
    worst: Mapping[str, Difference],
    precision: str,
    assignments: float,
    *,
    other_rounding: bool = False,
) -> tuple[Mismatch, ...]:
    """The differences that exceed their tolerances.

    Args:
        worst: Differences of a case, merged over all ranks.
        precision: `fp32` or `bf16`.
        assignments: Expert assignments of all tokens in the first step.
        other_rounding: The case's MoE layers round intermediate results at other points than the
            reference does; looser tolerances of the first step in bfloat16.
    """
    max_ties = max(1.0, MAX_TIE_FRACTION[precision] * assignments)
    tolerances = dict.fromkeys(
        ("loss", "term", "norm", "statistics"), FIRST_STEP_TOLERANCE[precision]
    )
    tolerances["gradient"] = GRADIENT_TOLERANCE[precision]
    tolerances["median-gradient"] = MEDIAN_GRADIENT_TOLERANCE[precision]
    if precision == "bf16" and other_rounding:
        tolerances = {
            quantity: OTHER_ROUNDING_FACTOR.get(quantity, 2) * tolerance
            for quantity, tolerance in tolerances.items()
        }
    tolerances |= {
        "update": UPDATE_TOLERANCE[precision],
        "start": 0.0,
        "counts": 0.0,
        "biases": BIAS_TOLERANCE,
        "assignments": max_ties,
    }
    if precision == "fp32":
        tolerances |= {
            "parameters": WEIGHT_TOLERANCE,
            "later": LATER_TOLERANCE,
            "later-parameters": WEIGHT_TOLERANCE,
            "later-assignments": max_ties,
            "later-biases": BIAS_TOLERANCE,
        }
    return tuple(
        Mismatch(quantity, worst[quantity].value, worst[quantity].name, tolerance)
        for quantity, tolerance in tolerances.items()
        if quantity in worst and not worst[quantity].value <= tolerance
    )
