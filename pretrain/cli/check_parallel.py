"""`vlmoe check-parallel`: ask, before a big job, whether many ranks compute what one process
computes."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from data_pipeline.common.commands import Subparsers, add_command
from pretrain.cli.common import add_run

_EXAMPLES = """\
  vlmoe check-parallel run.yaml --small --world-size 1,2,4
  vlmoe check-parallel run.yaml --small --world-size 4 --cells "ep=1,2,4 zero=1,3 accum=1,4" --out parity.json
  vlmoe check-parallel b16 --world-size 2 --cells own model.num_layers=4
  torchrun --nproc-per-node 8 -m pretrain check-parallel run.yaml --cells own --out parity.json

Started by itself it starts its own ranks on this machine's CPU; under torchrun it uses the ranks (and GPUs) that
are there, and a cell that fails or hangs ends the check. On SLURM: sbatch slurm/check_parallel.sbatch. The run
file's model, losses, balancing and optimizer are taken as they are; pairs are made up, some of them missing, so no
data is needed.

Cells: `all` (the default), `own` (the run file's layout), or axes: ep, zero (0, 1, 2, 3, 2_offload, own, or a
profile), accum, recompute (off, on), precision (fp32, bf16), missing (none, pairs, rank), terms (all, aux: the
routers' losses alone). Several --cells add up.

Exit status: 0 when every cell agrees with one process, 1 when one does not (or failed, or hung), 2 when the run
cannot be checked. Cells that cannot run are listed with the reason."""


def add(subparsers: Subparsers) -> None:
    """Add the command."""
    parser = add_command(
        subparsers,
        "check-parallel",
        examples=_EXAMPLES,
        summary="compare a run on many ranks with one process: losses, gradients, weights",
        description="Train the same weights on the same batch in every way of spreading the run over ranks, and in "
        "one process of plain torch, and compare everything.",
    )
    add_run(parser)
    parser.add_argument(
        "--world-size",
        metavar="N[,N...]",
        type=_numbers,
        default=None,
        help="numbers of ranks to start here, one world after the other (default: 2)",
    )
    parser.add_argument(
        "--cells",
        metavar="CELLS",
        action="append",
        default=None,
        help="which cells to check; may be given several times (default: all)",
    )
    parser.add_argument(
        "--small",
        action="store_true",
        help="scale the model down: the same options on fewer blocks, experts and numbers",
    )
    parser.add_argument(
        "--pairs",
        metavar="N",
        type=int,
        default=None,
        help="pairs of the global batch (default: as few as the cells can split)",
    )
    parser.add_argument(
        "--timeout",
        metavar="SECONDS",
        type=float,
        default=300.0,
        help="longest time for one cell (default: 300)",
    )
    parser.add_argument(
        "--out", metavar="FILE", type=Path, default=None, help="write everything there as JSON"
    )
    parser.set_defaults(handle=handle)


def handle(args: argparse.Namespace) -> int:
    """Check and print; 1 when a cell misses."""
    for name, value in (("--timeout", args.timeout), ("--pairs", args.pairs)):
        if value is not None and value <= 0:
            args.parser.error(f"{name} is {value:g}, but must be above 0")
    if (
        args.world_size
        and "RANK" in os.environ
        and args.world_size != [int(os.environ.get("WORLD_SIZE", "1"))]
    ):
        args.parser.error(
            f"--world-size is {', '.join(map(str, args.world_size))}, but the launcher started "
            f"{os.environ.get('WORLD_SIZE')} ranks; leave --world-size out there"
        )
    from pretrain.check.command import check_parallel

    good = check_parallel(
        args.run,
        args.overrides,
        worlds=args.world_size or [2],
        cells=args.cells or ["all"],
        small=args.small,
        pairs=args.pairs,
        seconds=args.timeout,
        out=args.out,
    )
    return 0 if good else 1


def _numbers(text: str) -> list[int]:
    """Whole numbers above 0, divided by commas."""
    words = text.split(",")
    if not all(word.isdigit() and int(word) > 0 for word in words):
        raise argparse.ArgumentTypeError(f"{text!r}: expected whole numbers above 0, such as 1,2,4")
    return [int(word) for word in words]
