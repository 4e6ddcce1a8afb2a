"""How far a trace is from the reference's, and whether that is too far. Pure.

Differences are judged by quantity. Those of the first step show what is wrong; those of later steps
only tell that something was: Adam makes steps of full size from gradients that are nothing but
rounding, so weights part ways where a gradient is nearly 0, and a choice between two nearly equal
experts may fall the other way.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

QUANTITIES = (
    "start",
    "loss",
    "term",
    "norm",
    "gradient",
    "statistics",
    "counts",
    "choices",
    "biases",
    "parameters",
    "update",
    "later",
    "later-choices",
    "later-biases",
    "later-parameters",
)
"""What is judged. `start` are the weights before the first step, `loss` is the total, `term` every
term before and after its weight and the contrastive scale, `norm` the gradient's before clipping,
`statistics` the routers' sums, `counts` pairs and tokens, `choices` those that another expert got,
`biases` those of the choice, `parameters` the weights and `update` the same beside the way they
have come; `later...` the same of the steps after the first, `later` alone for numbers."""

TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2}
LATER = 1e-4
"""Of losses, terms and norms after the first step, in float32. Bfloat16 is judged on the first
step: its rounding moves weights whose gradient is nearly 0 by a full step of Adam, and with them
tokens to other experts."""
WEIGHTS = 1e-3
"""Of weights after the first step, in float32."""
UPDATE = {"fp32": 2e-2, "bf16": 0.5}
"""Of weights after the first step, beside the way from where they began: an element whose gradient
is nothing but rounding goes a whole step of Adam anywhere, so weights cannot be judged by their own
size alone. A step that was not made, or was twice as long, is 1 off; 6 % of elements that went the
other way are 0.5."""
FEW_ELEMENTS = 256
"""Of smaller weights a handful that went the other way would be too large a share."""
BIAS = 1e-6
"""Absolute; biases follow from counts alone, so they are equal where choices are."""
TIES = {"fp32": 1e-4, "bf16": 5e-3}
"""Share of the choices that may fall to another expert because two had nearly equal scores."""
SMALLEST_TERM = 1e-2
"""A term nearer to 0, such as a shortfall of entropy, is judged by the digits that it was made
of."""
SMALLEST_GRADIENT = 1e-6
"""A gradient that is a smaller share of the whole gradient's norm is judged as if it were this
large."""


class Difference(NamedTuple):
    """How far one thing is off."""

    value: float
    """Relative; absolute for biases; a number for choices and counts; infinite for what is no
    number or missing."""
    name: str = ""
    """Of the term, weight or statistic."""


Worst = dict[str, Difference]
"""The largest difference of each quantity."""


class Miss(NamedTuple):
    """A difference above its limit."""

    quantity: str
    value: float
    name: str
    limit: float


class Verdict(NamedTuple):
    """What the differences of a cell mean."""

    misses: tuple[Miss, ...]
    ties: int
    """Choices of the first step that fell to another expert, few enough to be near ties."""
    later_ties: int = 0
    """The same of later steps."""

    @property
    def is_rough(self) -> bool:
        """Whether ties kept things from being judged strictly."""
        return bool(self.ties or self.later_ties)


class Comparison:
    """One rank's trace against the reference's, one tensor after the other, so that none need be
    kept."""

    def __init__(self, truth: Mapping[str, Tensor]) -> None:
        self._whole = _by_plain_name(truth)
        self._norm = float(truth["0/norm/norm"])
        self.worst: Worst = {}
        """The largest difference of each quantity."""
        self.each: dict[str, dict[str, float]] = {"term": {}, "gradient": {}}
        """How far every term and every gradient of the first step is off, by its name; of split
        experts the worst."""
        self.seen: list[str] = []
        """Names of what was compared."""

    def add(self, name: str, found: Tensor) -> None:
        """Compare one tensor of the trace."""
        step, quantity, leaf = name.split("/", 2)
        self.seen.append(name)
        expected = _expected(name, self._whole)
        value = math.inf
        if expected is not None and expected.shape == found.shape:
            value = _distance(quantity, found.double(), expected.double(), self._norm)
        key = _key(step, quantity)
        if key not in self.worst or value > self.worst[key].value:
            where = leaf if step in ("start", "0") else f"{leaf} (step {int(step) + 1})"
            self.worst[key] = Difference(value, where)
        if step == "0" and quantity == "parameters" and math.isfinite(value):
            self._add_update(name, leaf, found)
        if step == "0" and quantity in self.each:
            by_name = self.each[quantity]
            by_name[_plain(leaf)] = max(value, by_name.get(_plain(leaf), 0.0))

    def _add_update(self, name: str, leaf: str, found: Tensor) -> None:
        """How far a weight is off beside the way that it has come in the first step."""
        end, start = (
            _expected(name, self._whole),
            _expected(f"start/parameters/{leaf}", self._whole),
        )
        if end is None or start is None or end.numel() < FEW_ELEMENTS:
            return
        way = float((end.double() - start.double()).norm())
        value = float((found.double() - end.double()).norm()) / max(
            way, 1e-6 * float(end.double().norm()), 1e-30
        )
        if "update" not in self.worst or value > self.worst["update"].value:
            self.worst["update"] = Difference(value, leaf)


def compared(mine: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> Comparison:
    """A whole trace against the reference's."""
    comparison = Comparison(truth)
    for name, found in mine.items():
        comparison.add(name, found)
    return comparison


def merge(ranks: Iterable[Mapping[str, Iterable[Any]]]) -> Worst:
    """The largest difference of each quantity over ranks."""
    merged: Worst = {}
    for rank in ranks:
        for quantity, (value, name) in rank.items():
            if quantity not in merged or value > merged[quantity].value:
                merged[quantity] = Difference(float(value), str(name))
    return {quantity: merged[quantity] for quantity in QUANTITIES if quantity in merged}


def missing_names(seen: Iterable[str], truth: Mapping[str, Tensor]) -> Worst:
    """Things of the reference that no rank has, as infinite differences; of split experts each one
    counts."""
    spans: dict[str, list[tuple[int, int]]] = {}
    for name in set(seen):
        plain, _, span = name.partition("@")
        spans.setdefault(plain, []).append(_first_and_last(span) if span else (0, WHOLE))
    worst: Worst = {}
    for name, tensor in sorted(_by_plain_name(truth).items()):
        step, quantity, leaf = name.split("/", 2)
        found = spans.get(name, [])
        gap = _gap(found, tensor.shape[0] if tensor.dim() else 1)
        if not found:
            worst[_key(step, quantity)] = Difference(math.inf, f"no {leaf}")
        elif gap is not None:
            worst[_key(step, quantity)] = Difference(math.inf, f"no {leaf} of expert {gap}")
    return worst


WHOLE = 1 << 62
"""End of the span of a tensor that is not split."""


def _gap(spans: Iterable[tuple[int, int]], count: int) -> int | None:
    """The first of 0..count-1 that lies in none of the spans."""
    reached = 0
    for first, last in sorted(spans):
        if first > reached:
            break
        reached = max(reached, last)
    return reached if reached < count else None


def judge(
    worst: Mapping[str, Difference], precision: str, choices: float, *, other_rounding: bool = False
) -> Verdict:
    """Which differences are too large.

    Args:
        worst: Of a cell, over all ranks.
        precision: `fp32` or `bf16`.
        choices: Choices of all tokens in the first step.
        other_rounding: The cell's layers round at other places than the reference's, which counts
            in bfloat16.
    """
    changed = worst["choices"].value
    ties = 0 < changed <= TIES[precision] * choices
    later = worst["later-choices"].value
    later_ties = 0 < later <= TIES[precision] * choices
    first = TOLERANCE["bf16"] if ties else TOLERANCE[precision]
    if precision == "bf16" and other_rounding:
        first *= 2
    limits = dict.fromkeys(("loss", "term", "norm", "gradient", "statistics"), first)
    strict = precision == "fp32" and not ties
    limits |= (
        {"parameters": WEIGHTS, "update": UPDATE["fp32"]} if strict else {"update": UPDATE["bf16"]}
    )
    limits |= {"start": 0.0, "counts": 0.0, "choices": TIES[precision] * choices}
    if not changed:
        limits["biases"] = BIAS
    # Once a token has gone to another expert, two runs are two runs.
    if strict and not later_ties:
        limits |= {
            "later": LATER,
            "later-parameters": WEIGHTS,
            "later-choices": 0.0,
            "later-biases": BIAS,
        }
    misses = [
        Miss(quantity, worst[quantity].value, worst[quantity].name, limit)
        for quantity, limit in limits.items()
        if quantity in worst and not worst[quantity].value <= limit
    ]
    return Verdict(tuple(misses), int(changed) if ties else 0, int(later) if later_ties else 0)


def relative(a: Tensor, b: Tensor, smallest: float = 1e-30) -> float:
    """||a - b|| / ||b||; infinite when something is no number."""
    value = float((a.double() - b.double()).norm()) / max(float(b.double().norm()), smallest)
    return value if math.isfinite(value) else math.inf


def _distance(quantity: str, found: Tensor, expected: Tensor, norm: float) -> float:
    if quantity == "choices":
        # One that moves leaves one expert and comes to another; one too many has only come.
        apart = (found - expected).flatten(1) if found.dim() > 1 else found - expected
        value = max(float(apart.clamp(min=0).sum()), float((-apart).clamp(min=0).sum()))
    elif quantity in ("biases", "counts"):
        value = float((found - expected).abs().max()) if found.numel() else 0.0
    elif quantity == "gradient":
        return relative(found, expected, SMALLEST_GRADIENT * norm)
    elif quantity in ("parameters", "statistics", "norm"):
        return relative(found, expected, 1e-12)
    else:
        value = float((found - expected).abs()) / max(float(expected.abs()), SMALLEST_TERM)
    return value if math.isfinite(value) else math.inf


def _expected(name: str, whole: Mapping[str, Tensor]) -> Tensor | None:
    """The reference's tensor of this name; of stacked experts the slice."""
    expected = whole.get(_plain(name))
    _, _, span = name.partition("@")
    if expected is None or not span:
        return expected
    first, last = _first_and_last(span)
    return expected[first:last]


def _first_and_last(span: str) -> tuple[int, int]:
    first, last = map(int, span.split(":"))
    return first, last


def _by_plain_name(truth: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A reference holds all experts, so its names need not say which."""
    return {_plain(name): tensor for name, tensor in truth.items()}


def _plain(name: str) -> str:
    return name.partition("@")[0]


def _key(step: str, quantity: str) -> str:
    """Of `QUANTITIES`."""
    if step in ("start", "0"):
        return "start" if step == "start" else quantity
    return f"later-{quantity}" if quantity in ("choices", "biases", "parameters") else "later"


def all_choices(truth: Mapping[str, Tensor]) -> float:
    """Choices of all tokens in the reference's first step."""
    return float(truth["0/choices/chosen"].sum())


def merge_each(ranks: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """The largest difference of each name over ranks, the largest first."""
    merged: dict[str, float] = {}
    for rank in ranks:
        for name, value in rank.items():
            merged[name] = max(float(value), merged.get(name, 0.0))
    return dict(sorted(merged.items(), key=lambda item: (-item[1], item[0])))


def facts(truth: Mapping[str, Tensor], clip_norm: float) -> dict[str, Any]:
    """What the reference's three steps met, so that a comparison that compared nothing can be
    told."""
    steps = range(sum(name.endswith("/norm/norm") for name in truth))
    dropped = sum(
        float((truth[f"{s}/choices/chosen"] - truth[f"{s}/choices/kept"]).sum()) for s in steps
    )
    biases = truth["0/biases/biases"]
    clipped = [bool(clip_norm) and float(truth[f"{s}/norm/norm"]) > clip_norm for s in steps]
    moved = bool(biases.numel()) and bool(torch.stack([layer.any() for layer in biases]).all())
    return {
        "pairs": int(truth["0/counts/pairs"]),
        "choices": int(all_choices(truth)),
        "dropped": int(dropped),
        "biases_moved": moved,
        "clipped_steps": sum(clipped),
    }


def float64_floor(
    truth: Mapping[str, Tensor], exact: Mapping[str, Tensor]
) -> Iterator[tuple[str, Difference]]:
    """How far the float32 reference itself is from float64 in the first step, by quantity."""
    for quantity, difference in compared(truth, exact).worst.items():
        if not quantity.startswith("later"):
            yield quantity, difference
