"""Which cases to check: parses `--cases`.

    all                        every value of every axis (see `all_cases`)
    own                        the run file's layout, with and without gradient accumulation, with
                               the routers' auxiliary terms alone, and in float32
    ep=1,2 zero=1,3 accum=4    all combinations of these values; other axes keep one value

Several selections give the union of their cases.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from data_pipeline.common.errors import ConfigError
from pretrain.config.schema import RunConfig
from pretrain.parity.cases import MISSING, PRECISIONS, STAGES, TERMS, Case, stage_of

AXES: Mapping[str, str] = {
    "ep": "expert_parallel_size",
    "zero": "zero",
    "accum": "accumulation",
    "recompute": "recompute",
    "precision": "precision",
    "missing": "missing",
    "terms": "terms",
}
"""Field of `Case` for each axis of the command line."""
VALUES: Mapping[str, Sequence[str]] = {
    "recompute": ("off", "on"),
    "precision": PRECISIONS,
    "missing": MISSING,
    "terms": TERMS,
}
_EXAMPLE = (
    "'ep=1,2 zero=0,1,2,3 accum=1,4 "
    + " ".join(f"{axis}={','.join(values)}" for axis, values in VALUES.items())
    + "'"
)


def parse_cases(selections: Sequence[str], run: RunConfig, world_size: int) -> list[Case]:
    """The selected cases without duplicates, in the order of selection.

    Args:
        selections: Such as `all`, `own`, `ep=1,2 zero=0,3`; axes may also be separated by
            semicolons.
        run: Defines `own`, and the values of axes that a selection does not name.
        world_size: Number of ranks.

    Raises:
        ConfigError: An axis or a value is unknown.
    """
    selected: dict[Case, None] = {}
    for selection in selections:
        words = selection.replace(";", " ").split()
        if words == ["all"]:
            cases = all_cases(run, world_size)
        elif words == ["own"]:
            own = case_of_run(run)
            cases = [own, replace(own, accumulation=4), replace(own, terms="aux")]
            # The bfloat16 reference has the micro-batches of the case, so an error that depends
            # only on the split of a step is visible in float32.
            cases.append(replace(own, accumulation=4, precision="fp32"))
        elif words and all("=" in word for word in words):
            cases = _product(words, run)
        else:
            raise ConfigError(
                f"--cases {selection!r}: expected all, own, or axes such as {_EXAMPLE}"
            )
        selected |= dict.fromkeys(cases)
    return list(selected)


def case_of_run(run: RunConfig) -> Case:
    """The layout of the run file, with one micro-batch per step."""
    return Case(
        expert_parallel_size=run.parallel.expert_parallel_size,
        zero=run.parallel.deepspeed.removeprefix("zero"),
        recompute=run.model.activation_checkpointing,
        precision=run.precision.compute,
    )


def all_cases(run: RunConfig, world_size: int) -> list[Case]:
    """The whole test matrix.

    All combinations of expert parallelism, ZeRO stage, precision, accumulation (1, 4) and
    activation checkpointing, with some pairs missing. In addition, for each expert parallelism and
    stage: float32 with no pairs missing and with those of one rank missing, and bfloat16 with the
    routers' auxiliary terms alone.

    Expert parallelism takes the powers of two up to 8 and the run's value. The stage of the run's
    profile is checked with that profile, the other stages with the profiles of `ds_configs/`.
    """
    own = case_of_run(run)
    own_stage = str(stage_of(own))
    powers = {size for size in (1, 2, 4, 8) if size <= world_size}
    layouts = [
        Case(expert_parallel_size=size, zero=own.zero if stage == own_stage else stage)
        for size in sorted(powers | {own.expert_parallel_size})
        for stage in STAGES
    ]
    grid = [
        replace(layout, precision=precision, accumulation=accumulation, recompute=recompute)
        for layout in layouts
        for precision in PRECISIONS
        for accumulation in (1, 4)
        for recompute in (False, True)
    ]
    # With a single rank, a step must keep some pairs, but one of its micro-batches can be empty.
    accumulation = 4 if world_size == 1 else 1
    others = [
        replace(layout, missing=missing, accumulation=accumulation)
        for layout in layouts
        for missing in MISSING
        if missing != "pairs"
    ]
    auxiliary = [replace(layout, precision="bf16", terms="aux") for layout in layouts]
    return grid + others + auxiliary


def _product(words: Sequence[str], run: RunConfig) -> list[Case]:
    values: dict[str, list[Any]] = {}
    for word in words:
        axis, _, text = word.partition("=")
        if axis not in AXES:
            raise ConfigError(
                f"--cases: unknown axis {axis!r}; expected one of {', '.join(AXES)}, such as "
                f"{_EXAMPLE}"
            )
        values[AXES[axis]] = [_value(axis, part, run) for part in text.split(",")]
    default = replace(case_of_run(run), recompute=False)
    return [
        replace(default, **dict(zip(values, combination, strict=True)))
        for combination in itertools.product(*values.values())
    ]


def _value(axis: str, text: str, run: RunConfig) -> Any:
    if axis in ("ep", "accum"):
        if text.isdigit() and int(text) > 0:
            return int(text)
        raise ConfigError(f"--cases: {axis}={text}: expected a positive integer")
    if axis == "zero":
        return case_of_run(run).zero if text == "own" else text.removeprefix("zero")
    if text not in VALUES[axis]:
        raise ConfigError(f"--cases: {axis}={text!r}: expected one of {', '.join(VALUES[axis])}")
    return text == "on" if axis == "recompute" else text
