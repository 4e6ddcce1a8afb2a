"""Outcomes as a table for people, row by row as they come, and as JSON for programs. Pure."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pretrain.check.compare import (
    BIAS,
    LATER,
    SMALLEST_GRADIENT,
    SMALLEST_TERM,
    TIES,
    TOLERANCE,
    UPDATE,
    WEIGHTS,
    Difference,
    Worst,
)
from pretrain.check.job import Outcome

WHOLE_WIDTH = 142
"""Letters that the table with all its columns takes at least; names are cut to fit, and whole under
a miss and in the JSON. A narrower terminal gets fewer columns."""
MOST_OTHERS = 4
"""Further terms or weights that are named under a miss."""
_CELL, _NUMBER = 34, 5


def head(width: int) -> list[str]:
    """The names of the columns, and a line under them."""
    if width < WHOLE_WIDTH:
        line = " ".join(
            ["cell".ljust(_CELL), " loss", " term", " norm", "gradient", "weights", "verdict"]
        )
        return [line, "-" * len(line)]
    term, gradient = _name_widths(width)
    words = [
        "cell".ljust(_CELL),
        " loss",
        " term",
        "which".ljust(term),
        " norm",
        "gradient",
        "of".ljust(gradient),
        "later",
        "weights",
        "biases",
        "choices",
        "  sec",
        "verdict",
    ]
    line = " ".join(words)
    return [line, "-" * len(line)]


def row(outcome: Outcome, width: int) -> str:
    """One outcome in one line; how far everything is off, at most."""
    label = _cut(outcome.cell.label(outcome.world_size), _CELL).ljust(_CELL)
    if outcome.verdict is None:
        return f"{label} {outcome.status.upper() if outcome.is_bad else outcome.status}: {outcome.reason}"
    found = outcome.worst

    def number(quantity: str, room: int = _NUMBER) -> str:
        return _short(found.get(quantity, Difference(0.0)).value).rjust(room)

    if width < WHOLE_WIDTH:
        return " ".join(
            [
                label,
                number("loss"),
                number("term"),
                number("norm"),
                number("gradient", 8),
                number("parameters", 7),
                _verdict(outcome),
            ]
        )
    term, gradient = _name_widths(width)
    return " ".join(
        [
            label,
            number("loss"),
            number("term"),
            _name(found, "term", term),
            number("norm"),
            number("gradient", 8),
            _name(found, "gradient", gradient),
            number("later"),
            number("parameters", 7),
            number("biases", 6),
            number("choices", 7),
            f"{outcome.seconds:5.1f}",
            _verdict(outcome),
        ]
    )


def details(outcome: Outcome) -> list[str]:
    """Under the row of a miss: every quantity that is too far off, where most, and what was
    allowed."""
    if outcome.verdict is None:
        return []
    lines = []
    for miss in outcome.verdict.misses:
        lines.append(
            f"    {miss.quantity}: {miss.value:.2g} off in {miss.name}; allowed {miss.limit:.2g}"
        )
        too_far = [
            name
            for name, value in outcome.each.get(miss.quantity, {}).items()
            if not value <= miss.limit
        ]
        others = [name for name in too_far if name != miss.name.partition("@")[0]]
        if others:
            more = f" and {len(others) - MOST_OTHERS} more" if len(others) > MOST_OTHERS else ""
            lines.append(
                f"        also {', '.join(others[:MOST_OTHERS])}{more}, of "
                f"{len(outcome.each[miss.quantity])}"
            )
    return lines


def foot(
    outcomes: Sequence[Outcome], floors: Mapping[str, Worst], width: int = WHOLE_WIDTH
) -> list[str]:
    """How it was judged, and what came of it."""
    by_status = {
        status: sum(outcome.status == status for outcome in outcomes)
        for status in ("ok", "miss", "error", "hang", "not-run", "unsupported")
    }
    lines = [
        "",
        *textwrap.wrap(
            f"Differences are relative to one process of plain torch in the cell's own precision, on the same weights "
            f"and batch; biases are absolute, choices a count. Weights must begin as equals. Allowed in the first step: "
            f"{TOLERANCE['fp32']:g} in fp32 and {TOLERANCE['bf16']:g} in bf16, biases {BIAS:g} where choices agree, "
            f"weights after it (`weights`) {WEIGHTS:g} in fp32, and of the way that they have come {UPDATE['fp32']:g} in "
            f"fp32 and {UPDATE['bf16']:g} in bf16. Later steps are judged in fp32 and "
            f"where choices agree: {LATER:g}. Of all choices a share of {TIES['fp32']:g} in fp32 and "
            f"{TIES['bf16']:g} in bf16 may fall to another expert, as near ties do; an fp32 cell with ties is tried on "
            f"other weights and pairs, and at last judged as a bf16 one. Terms below {SMALLEST_TERM:g} count as that "
            f"large, and so do gradients below {SMALLEST_GRADIENT:g} of the whole norm.",
            min(width, WHOLE_WIDTH),
        ),
    ]
    for name, worst in floors.items():
        far = ", ".join(
            f"{quantity} {_short(d.value)}"
            for quantity, d in worst.items()
            if quantity in ("loss", "term", "norm", "gradient", "choices")
        )
        lines.append(f"The float32 reference ({name}) is itself this far from float64: {far}.")
        if any(
            worst[q].value > TOLERANCE["fp32"]
            for q in ("loss", "term", "norm", "gradient")
            if q in worst
        ):
            lines.append(
                "That is more than fp32 is allowed: here rounding alone may look like a miss."
            )
    told = ", ".join(f"{count} {status}" for status, count in by_status.items() if count)
    compared = by_status["ok"] + by_status["miss"]
    nothing = (
        []
        if compared
        else ["Nothing was compared, so nothing is known: choose cells that this world can run."]
    )
    return [*lines, *nothing, f"{len(outcomes)} cells: {told or 'none'}"]


def as_json(
    outcomes: Iterable[Outcome],
    floors: Mapping[str, Worst],
    about: Mapping[str, Any],
    *,
    complete: bool,
) -> dict[str, Any]:
    """Everything, as plain values."""
    return {
        "version": 1,
        **about,
        "complete": complete,
        "tolerance": {
            "first": TOLERANCE,
            "later": LATER,
            "weights": WEIGHTS,
            "update": UPDATE,
            "biases": BIAS,
            "ties": TIES,
            "smallest_term": SMALLEST_TERM,
            "smallest_gradient": SMALLEST_GRADIENT,
        },
        "float64": {
            name: {quantity: d._asdict() for quantity, d in worst.items()}
            for name, worst in floors.items()
        },
        "cells": [outcome.to_json() for outcome in outcomes],
    }


def _verdict(outcome: Outcome) -> str:
    assert outcome.verdict is not None
    if outcome.verdict.misses:
        return "MISS: " + ", ".join(miss.quantity for miss in outcome.verdict.misses)
    ties = outcome.verdict.ties or outcome.verdict.later_ties
    return f"ok, {ties} {'ties' if outcome.verdict.ties else 'later ties'}" if ties else "ok"


def _name_widths(width: int) -> tuple[int, int]:
    """Room for the names of a term and of a weight."""
    spare = width - WHOLE_WIDTH
    return 13 + spare // 3, 22 + spare // 3


def _name(worst: Worst, quantity: str, width: int) -> str:
    return _cut(worst.get(quantity, Difference(0.0)).name, width).ljust(width)


def _short(value: float) -> str:
    """One digit and the power of ten; small whole numbers as they are."""
    return str(int(value)) if value < 1e5 and value == int(value) else f"{value:.0e}"


def _cut(text: str, width: int) -> str:
    """The text with its middle left out where it is too long."""
    if len(text) <= width:
        return text
    tail = (width - 2) * 2 // 3
    return f"{text[: width - 2 - tail]}..{text[-tail:]}"
