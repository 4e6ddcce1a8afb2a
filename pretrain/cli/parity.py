"""`vlmoe parity`: compares parallel layouts of a run with a single process."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from data_pipeline.common.commands import Subparsers, add_command
from pretrain.cli.common import add_run_arguments

_EXAMPLES = """\
  vlmoe parity run.yaml --small --world-size 1,2,4
  vlmoe parity run.yaml --small --world-size 4 --cases "ep=1,2,4 zero=1,3" --out parity.json
  vlmoe parity b16 --world-size 2 --cases own model.num_layers=4
  torchrun --nproc-per-node 8 -m pretrain parity run.yaml --cases own --out parity.json

Without torchrun, the command starts ranks on the CPUs of this machine; a case that fails or hangs
is reported, and the other cases still run. Under torchrun, it uses the launched ranks and their
GPUs, and a case that fails or hangs ends the check. On SLURM: sbatch slurm/parity.sbatch.

The model, losses, balancing and optimizer are those of the run file. The batch is synthetic, with
some pairs missing, so no data is needed.

A case is one combination of parallel layout, precision, missing pairs and loss terms.
Cases (--cases):
  all         every value of every axis (default)
  own         the layout of the run file, also in float32
  AXIS=V,...  all combinations of the given values; axes:
    ep         expert parallel size
    zero       ZeRO stage (0, 1, 2, 3), 2_offload, own (the run file's profile) or a profile's path
    accum      gradient accumulation steps
    recompute  activation checkpointing: off, on
    precision  fp32, bf16
    missing    missing pairs: none, pairs (every fifth), rank (all pairs of one rank)
    terms      loss terms: all, aux (only the auxiliary losses of the routers)
In the table, `recomp` is recompute=on, `gaps` missing=pairs, `empty` missing=rank.

Exit status: 0 if every case agrees with a single process; 1 if a case does not agree, fails or
hangs; 2 if the run cannot be checked. Unsupported cases are listed with the reason."""


def add(subparsers: Subparsers) -> None:
    """Add the command."""
    parser = add_command(
        subparsers,
        "parity",
        examples=_EXAMPLES,
        summary="compare parallel layouts of a run with a single process",
        description="Train the same weights on the same batch with every parallel layout and in a\n"
        "single process without DeepSpeed, and compare losses, gradients, weights and routing.",
    )
    add_run_arguments(parser)
    parser.add_argument(
        "--world-size",
        metavar="N[,N...]",
        type=_positive_integers,
        default=None,
        help="numbers of ranks to start, one after the other (default: 2)",
    )
    parser.add_argument(
        "--cases",
        metavar="CASES",
        action="append",
        default=None,
        help="cases to check, see below; may be repeated (default: all)",
    )
    parser.add_argument(
        "--small",
        action="store_true",
        help="scale the model down: the same options with fewer layers and experts",
    )
    parser.add_argument(
        "--pairs",
        metavar="N",
        type=int,
        default=None,
        help="global batch size (default: the smallest that divides evenly in all cases)",
    )
    parser.add_argument(
        "--timeout",
        metavar="SECONDS",
        type=float,
        default=300.0,
        help="time limit of one case, in seconds (default: 300)",
    )
    parser.add_argument(
        "--out", metavar="FILE", type=Path, default=None, help="write a JSON report to FILE"
    )
    parser.set_defaults(handle=handle)


def handle(args: argparse.Namespace) -> int:
    """Run the command; exit status 1 if a case does not agree."""
    for name, value in (("--timeout", args.timeout), ("--pairs", args.pairs)):
        if value is not None and value <= 0:
            args.parser.error(f"{name} is {value:g}, but must be above 0")
    _check_world_size(args)

    from pretrain.parity.command import ParityOptions, check_parity

    options = ParityOptions(
        world_sizes=args.world_size or [2],
        cases=args.cases or ["all"],
        small=args.small,
        pairs=args.pairs,
        timeout_seconds=args.timeout,
        out=args.out,
    )
    return 0 if check_parity(args.run, args.overrides, options) else 1


def _check_world_size(args: argparse.Namespace) -> None:
    """Reject a `--world-size` other than the number of launched ranks."""
    if not args.world_size or "RANK" not in os.environ:
        return
    if args.world_size != [int(os.environ.get("WORLD_SIZE", "1"))]:
        args.parser.error(
            f"--world-size is {', '.join(map(str, args.world_size))}, but the launcher started "
            f"{os.environ.get('WORLD_SIZE')} ranks; omit --world-size under torchrun"
        )


def _positive_integers(text: str) -> list[int]:
    """Comma-separated integers above 0."""
    parts = text.split(",")
    if not all(part.isdigit() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r}: expected positive integers, such as 1,2,4")
    return [int(part) for part in parts]
