"""Which cells there are to check, and why some of them cannot run. Pure.

A cell is one way to spread a step: expert parallelism, ZeRO stage, micro-batches, recomputation,
number format, and which pairs of the global batch are missing. Cells are asked for by axes:

    all                                  every value of every axis (see `every_cell`)
    own                                  what the run file says, with and without accumulation, and its routers alone
    ep=1,2 zero=1,3 accum=4              the product of these values; axes that are not named keep one value each

and several such texts give the union of their cells.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from data_pipeline.common.errors import ConfigError
from pretrain.config.schema import BatchConfig, PrecisionConfig, RunConfig
from pretrain.config.validate import problems
from pretrain.parallel.deepspeed_config import load_profile, profile_path, zero_stage, zero_stage_of

STAGES = ("0", "1", "2", "3")
Precision = Literal["fp32", "bf16"]
Missing = Literal["none", "pairs", "rank"]
Terms = Literal["all", "aux"]
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16")
MISSING: tuple[Missing, ...] = ("none", "pairs", "rank")
TERMS: tuple[Terms, ...] = ("all", "aux")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One way to spread a step over ranks."""

    expert_parallel_size: int = 1
    """Ranks that share one copy of the experts."""
    zero: str = "1"
    """What follows `zero` in the name of a profile of `ds_configs/`, such as `3` or `2_offload`; or
    the path of a profile."""
    accumulation: int = 1
    """Micro-batches of a step on each rank."""
    recompute: bool = False
    """Activations are computed again in the backward pass."""
    precision: Precision = "fp32"
    missing: Missing = "pairs"
    """Pairs that were bad: none, a few here and there, or all those of one rank."""
    terms: Terms = "all"
    """Train on the run's whole loss, or on the routers' terms alone: their gradients are often so
    small beside the others' that a wrong one would hide in the rounding of bfloat16."""

    @property
    def profile(self) -> str:
        """`parallel.deepspeed` of the cell."""
        return self.zero if self.zero.endswith(".json") else f"zero{self.zero}"

    def label(self, world_size: int) -> str:
        """The cell in one line of short words."""
        zero = self.zero if len(self.zero) < 12 else self.zero.rsplit("/", 1)[-1]
        words = [
            f"{world_size}x",
            f"ep{self.expert_parallel_size}",
            f"zero{zero}",
            f"accum{self.accumulation}",
            self.precision,
        ]
        words += ["redo"] if self.recompute else []
        words += {"none": [], "pairs": ["gaps"], "rank": ["empty"]}[self.missing]
        words += ["aux"] if self.terms == "aux" else []
        return " ".join(words)

    def to_json(self) -> dict[str, Any]:
        """A JSON object that `Cell(**object)` turns back."""
        return asdict(self)


AXES: Mapping[str, str] = {
    "ep": "expert_parallel_size",
    "zero": "zero",
    "accum": "accumulation",
    "recompute": "recompute",
    "precision": "precision",
    "missing": "missing",
    "terms": "terms",
}
"""Words of the command line for the fields of a cell."""


def parse_cells(texts: Sequence[str], run: RunConfig, world_size: int) -> list[Cell]:
    """The cells that some texts ask for, each once, in the order in which they are asked for.

    Args:
        texts: Such as `all`, `own`, `ep=1,2 zero=0,3`; axes may also be divided by semicolons.
        run: Gives the values of `own`, and those of axes that a text does not name.
        world_size: Ranks.

    Raises:
        ConfigError: An axis or a value is unknown.
    """
    found: dict[Cell, None] = {}
    for text in texts:
        words = text.replace(";", " ").split()
        if words == ["all"]:
            cells = every_cell(run, world_size)
        elif words == ["own"]:
            own = own_cell(run)
            cells = [own, replace(own, accumulation=4), replace(own, terms="aux")]
        elif words and all("=" in word for word in words):
            cells = _product(words, run)
        else:
            raise ConfigError(f"--cells {text!r}: expected all, own, or axes such as {_example()}")
        found |= dict.fromkeys(cells)
    return list(found)


def own_cell(run: RunConfig) -> Cell:
    """The cell of the run file itself, in one micro-batch."""
    return Cell(
        expert_parallel_size=run.parallel.expert_parallel_size,
        zero=own_zero(run),
        recompute=run.model.activation_checkpointing,
        precision=run.precision.compute,
    )


def own_zero(run: RunConfig) -> str:
    """The run's own profile, as `Cell.zero` says it."""
    return run.parallel.deepspeed.removeprefix("zero")


def every_cell(run: RunConfig, world_size: int) -> list[Cell]:
    """All values of all axes with a few missing pairs; in float32 also with none and with those of
    a whole rank, and in bfloat16 also by the routers' terms alone.

    Expert parallelism takes the powers of two up to 8 and the run's own. A stage for which the run
    has a profile of its own is checked with that profile.
    """
    sizes = sorted(
        {size for size in (1, 2, 4, 8) if size <= world_size} | {run.parallel.expert_parallel_size}
    )
    profiles = _profiles(run)
    grid = [
        Cell(
            expert_parallel_size=size,
            zero=zero,
            accumulation=accumulation,
            recompute=recompute,
            precision=precision,
        )
        for size in sizes
        for zero in profiles
        for precision in PRECISIONS
        for accumulation in (1, 4)
        for recompute in (False, True)
    ]
    # The only rank of a world cannot be without a pair, but one of its micro-batches can.
    others = [
        Cell(
            expert_parallel_size=size,
            zero=zero,
            missing=missing,
            accumulation=4 if world_size == 1 else 1,
        )
        for size in sizes
        for zero in profiles
        for missing in MISSING
        if missing != "pairs"
    ]
    routers = [
        Cell(expert_parallel_size=size, zero=zero, precision="bf16", terms="aux")
        for size in sizes
        for zero in profiles
    ]
    return grid + others + routers


def _profiles(run: RunConfig) -> list[str]:
    """The stages, each by the run's own profile where that has this stage."""
    own = own_cell(run)
    own_stage = str(stage_of(own))
    return [own.zero if stage == own_stage else stage for stage in STAGES]


def stage_of(cell: Cell) -> int:
    """The ZeRO stage of the cell's profile.

    Raises:
        ConfigError: There is no such profile, or it does not say.
    """
    path = profile_path(cell.profile)
    return zero_stage(load_profile(path), path)


def pairs_for(cells: Iterable[Cell], run: RunConfig, world_size: int) -> int:
    """Pairs of the smallest global batch that all these cells can split.

    Each micro-batch of each rank gets one capacity group, or two pairs where places are not
    limited.
    """
    counts = [cell.accumulation for cell in cells]
    unit = run.moe.capacity_group_size if run.moe.capacity_factor else 2
    return world_size * unit * math.lcm(1, *counts)


def cell_run(run: RunConfig, cell: Cell, world_size: int, pairs: int) -> RunConfig:
    """The run as this cell spreads it; `pairs` must be a multiple of world x accumulation."""
    loss = (
        run.loss
        if cell.terms == "all"
        else replace(run.loss, contrastive_weight=0.0, caption_weight=0.0)
    )
    return replace(
        run,
        loss=loss,
        model=replace(run.model, activation_checkpointing=cell.recompute),
        batch=BatchConfig(
            global_batch_size=pairs, micro_batch_size=pairs // (world_size * cell.accumulation)
        ),
        precision=PrecisionConfig(compute=cell.precision),
        parallel=replace(
            run.parallel,
            engine="deepspeed",
            expert_parallel_size=cell.expert_parallel_size,
            deepspeed=cell.profile,
        ),
    )


def why_not(run: RunConfig, cell: Cell, world_size: int, pairs: int) -> str:
    """Why a cell cannot run, in words; empty when it can."""
    if pairs % (world_size * cell.accumulation):
        return (
            f"{pairs} pairs do not split into {world_size} ranks x {cell.accumulation} micro-batches; use a "
            f"multiple of {world_size * cell.accumulation} pairs"
        )
    if cell.missing == "rank" and world_size == 1 and cell.accumulation == 1:
        return "the only rank cannot be without a pair"
    try:
        stage_of(cell)
    except ConfigError as error:
        return str(error)
    # A run that learned nothing but routing would be refused; a cell that checks its gradients is
    # not.
    of_cell = cell_run(run, replace(cell, terms="all"), world_size, pairs)
    return "; ".join(problems(of_cell, world_size, zero_stage_of(of_cell)))


def check_run(run: RunConfig, world_size: int, pairs: int) -> list[str]:
    """What is wrong with a run in every cell, so that nothing could be checked."""
    plain = Cell(precision=run.precision.compute)
    return problems(
        cell_run(run, plain, world_size, max(pairs - pairs % world_size, world_size)), world_size
    )


def missing_rows(cell: Cell, world_size: int, pairs: int) -> tuple[int, ...]:
    """Rows of the global batch that are bad in this cell, rising.

    A few: every fifth from the second on, which leaves ranks with unequal numbers. A rank's: those
    that the cell gives to the last rank; with a single rank, those of its first micro-batch.
    """
    if cell.missing == "none":
        return ()
    if cell.missing == "pairs":
        return tuple(range(1, pairs, 5))
    per_forward = pairs // (world_size * cell.accumulation)
    if world_size == 1:
        return tuple(range(per_forward))
    return tuple(row for row in range(pairs) if row // per_forward % world_size == world_size - 1)


def _product(words: Sequence[str], run: RunConfig) -> list[Cell]:
    values: dict[str, list[Any]] = {}
    for word in words:
        axis, _, text = word.partition("=")
        if axis not in AXES:
            raise ConfigError(
                f"--cells: there is no axis {axis!r}; possible: {', '.join(AXES)}; such as {_example()}"
            )
        values[AXES[axis]] = [_value(axis, part, run) for part in text.split(",")]
    own = Cell(
        expert_parallel_size=run.parallel.expert_parallel_size,
        zero=own_zero(run),
        precision=run.precision.compute,
    )
    return [
        replace(own, **dict(zip(values, combination, strict=True)))
        for combination in itertools.product(*values.values())
    ]


def _value(axis: str, text: str, run: RunConfig) -> Any:
    if axis in ("ep", "accum"):
        if text.isdigit() and int(text) > 0:
            return int(text)
        raise ConfigError(f"--cells: {axis}={text}: expected a whole number above 0")
    if axis == "zero":
        return own_zero(run) if text == "own" else text.removeprefix("zero")
    allowed: dict[str, Mapping[str, Any]] = {
        "recompute": {"off": False, "on": True},
        "precision": {"fp32": "fp32", "bf16": "bf16"},
        "missing": {name: name for name in MISSING},
        "terms": {name: name for name in TERMS},
    }
    if text not in allowed[axis]:
        raise ConfigError(f"--cells: {axis}={text!r}; possible: {', '.join(allowed[axis])}")
    return allowed[axis][text]


def _example() -> str:
    return (
        "'ep=1,2 zero=0,1,2,3 accum=1,4 recompute=off,on precision=fp32,bf16 missing=none,pairs,rank "
        "terms=all,aux'"
    )
