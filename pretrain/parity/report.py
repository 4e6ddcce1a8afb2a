"""The report of a check: a table, one row per case as it finishes, and JSON."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pretrain.parallel.tensor_names import split_name
from pretrain.parity.compare import MIN_GRADIENT_RATIO, MIN_TERM, Difference, WorstDifferences
from pretrain.parity.job import Result
from pretrain.parity.tolerances import (
    BIAS_TOLERANCE,
    FIRST_STEP_TOLERANCE,
    GRADIENT_TOLERANCE,
    LATER_TOLERANCE,
    MAX_TIE_FRACTION,
    MEDIAN_GRADIENT_TOLERANCE,
    UPDATE_TOLERANCE,
    WEIGHT_TOLERANCE,
)

FULL_WIDTH = 144
"""Characters of the table with all columns. Names are shortened to fit; they are complete below a
mismatch and in the JSON. A narrower terminal gets fewer columns."""
MAX_OTHER_NAMES = 4
"""Further terms or weights listed below a mismatch."""
_LABEL, _NUMBER = 36, 5
_STATUSES = ("ok", "mismatch", "error", "hang", "not-run", "unsupported")


def header(width: int) -> list[str]:
    """The column names and a separator line."""
    term, gradient = _name_widths(width)
    columns = ["case".ljust(_LABEL), " loss", " term"]
    if width < FULL_WIDTH:
        columns += [" norm", "gradient", "weights", "result"]
    else:
        columns += ["(name)".ljust(term), " norm", "gradient", "(name)".ljust(gradient)]
        columns += ["later", "weights", "biases", "routing", "  sec", "result"]
    line = " ".join(columns)
    return [line, "-" * len(line)]


def row(result: Result, width: int) -> str:
    """One result in one line: the largest difference of each quantity."""
    label = _shorten(result.case.label(result.world_size), _LABEL).ljust(_LABEL)
    if not result.is_compared:
        status = result.status.upper() if result.is_failure else result.status
        return f"{label} {status}: {result.reason}"

    worst = result.worst

    def number(quantity: str, column_width: int = _NUMBER) -> str:
        return _format(worst.get(quantity, Difference(0.0)).value).rjust(column_width)

    term, gradient = _name_widths(width)
    columns = [label, number("loss"), number("term")]
    if width < FULL_WIDTH:
        columns += [number("norm"), number("gradient", 8), number("parameters", 7)]
    else:
        columns += [_name(worst, "term", term), number("norm"), number("gradient", 8)]
        columns += [_name(worst, "gradient", gradient), number("later"), number("parameters", 7)]
        columns += [number("biases", 6), number("assignments", 7), f"{result.seconds:5.1f}"]
    return " ".join([*columns, _result(result)])


def mismatch_lines(result: Result) -> list[str]:
    """Lines below the row of a mismatch: each quantity with its difference and tolerance."""
    if not result.is_compared:
        return []

    lines = []
    for mismatch in result.mismatches:
        lines.append(
            f"    {mismatch.quantity}: difference {mismatch.value:.2g} in {mismatch.name}, "
            f"tolerance {mismatch.tolerance:.2g}"
        )
        by_name = result.by_name.get(mismatch.quantity, {})
        above = [name for name, value in by_name.items() if not value <= mismatch.tolerance]
        others = [name for name in above if name != split_name(mismatch.name)[0]]
        if others:
            hidden = len(others) - MAX_OTHER_NAMES
            more = f" and {hidden} more" if hidden > 0 else ""
            lines.append(
                f"        also {', '.join(others[:MAX_OTHER_NAMES])}{more}, of {len(by_name)}"
            )
    return lines


def summary(
    results: Sequence[Result],
    float32_errors: Mapping[str, WorstDifferences],
    width: int = FULL_WIDTH,
) -> list[str]:
    """Lines below the table: tolerances, error of the reference, number of cases by status."""
    lines = ["", *textwrap.wrap(_tolerances(), min(width, FULL_WIDTH))]
    for name, worst in float32_errors.items():
        lines += _reference_error(name, worst)

    counts = {status: sum(result.status == status for result in results) for status in _STATUSES}
    if not counts["ok"] + counts["mismatch"]:
        lines.append("No case was compared; select cases that this number of ranks supports.")
    listed = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
    return [*lines, f"{len(results)} cases: {listed or 'none'}"]


def _tolerances() -> str:
    return (
        "Differences are relative to a single process without DeepSpeed with the same precision, "
        "initial weights and batch; those of biases are absolute, those of assignments are counts. "
        "Initial weights must be equal, and all runs use the expert assignments of the single "
        f"process. Tolerances of the first step: {FIRST_STEP_TOLERANCE['fp32']:g} in fp32, "
        f"{FIRST_STEP_TOLERANCE['bf16']:g} in bf16 ({GRADIENT_TOLERANCE['bf16']:g} for gradients, "
        f"{MEDIAN_GRADIENT_TOLERANCE['bf16']:g} for their median); "
        f"biases {BIAS_TOLERANCE:g}. After it, weights may differ by {WEIGHT_TOLERANCE:g} in "
        f"fp32, and by {UPDATE_TOLERANCE['fp32']:g} (fp32) "
        f"or {UPDATE_TOLERANCE['bf16']:g} (bf16) of the norm of their update. Later steps are "
        f"compared in fp32: {LATER_TOLERANCE:g}. One assignment, or a fraction of "
        f"{MAX_TIE_FRACTION['fp32']:g} (fp32) or {MAX_TIE_FRACTION['bf16']:g} (bf16), may differ "
        "from what a run itself would select, as experts with nearly equal scores (ties) do. Terms "
        "below "
        f"{MIN_TERM:g} are compared as if they were {MIN_TERM:g}, gradients below "
        f"{MIN_GRADIENT_RATIO:g} of the global norm as if they had that norm."
    )


def _reference_error(name: str, worst: WorstDifferences) -> list[str]:
    shown = ("loss", "term", "norm", "gradient", "assignments")
    errors = ", ".join(
        f"{quantity} {_format(difference.value)}"
        for quantity, difference in worst.items()
        if quantity in shown
    )
    lines = [f"Rounding error of the float32 reference ({name}), relative to float64: {errors}."]
    tolerance = FIRST_STEP_TOLERANCE["fp32"]
    relative = [worst[quantity] for quantity in shown[:-1] if quantity in worst]
    if any(difference.value > tolerance for difference in relative):
        lines.append("It exceeds the fp32 tolerance: rounding alone may cause a mismatch.")
    return lines


def as_json(
    results: Iterable[Result],
    float32_errors: Mapping[str, WorstDifferences],
    metadata: Mapping[str, Any],
    *,
    complete: bool,
) -> dict[str, Any]:
    """The report as a JSON object; `complete` is false until all cases are done."""
    return {
        "version": 1,
        **metadata,
        "complete": complete,
        "tolerance": {
            "first": FIRST_STEP_TOLERANCE,
            "gradient": GRADIENT_TOLERANCE,
            "median_gradient": MEDIAN_GRADIENT_TOLERANCE,
            "later": LATER_TOLERANCE,
            "weights": WEIGHT_TOLERANCE,
            "update": UPDATE_TOLERANCE,
            "biases": BIAS_TOLERANCE,
            "ties": MAX_TIE_FRACTION,
            "min_term": MIN_TERM,
            "min_gradient_ratio": MIN_GRADIENT_RATIO,
        },
        "float64": {
            name: {quantity: difference._asdict() for quantity, difference in worst.items()}
            for name, worst in float32_errors.items()
        },
        "cases": [result.to_json() for result in results],
    }


def _result(result: Result) -> str:
    if result.mismatches:
        return "MISMATCH: " + ", ".join(m.quantity for m in result.mismatches)
    ties = result.worst.get("assignments", Difference(0.0)).value
    return f"ok, {ties:.0f} ties" if ties else "ok"


def _name_widths(width: int) -> tuple[int, int]:
    """Widths of the columns with the names of a term and of a weight."""
    spare = width - FULL_WIDTH
    return 13 + spare // 3, 22 + spare // 3


def _name(worst: WorstDifferences, quantity: str, width: int) -> str:
    return _shorten(worst.get(quantity, Difference(0.0)).name, width).ljust(width)


def _format(value: float) -> str:
    """One digit and the power of ten; integers below 1e5 as they are."""
    return str(int(value)) if value < 1e5 and value == int(value) else f"{value:.0e}"


def _shorten(text: str, width: int) -> str:
    """The text, with `..` in its middle if it is too long."""
    if len(text) <= width:
        return text
    tail = (width - 2) * 2 // 3
    return f"{text[: width - 2 - tail]}..{text[-tail:]}"
