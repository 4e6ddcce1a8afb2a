"""`vlmoe train`: train, or go on with training."""

from __future__ import annotations

import argparse
from pathlib import Path

from data_pipeline.common.commands import Subparsers, add_command
from pretrain.cli.common import add_run, started_as

_EXAMPLES = """\
  vlmoe train run.yaml --out runs/first
  vlmoe train run.yaml --out runs/first optim.lr=3e-4 parallel.engine=plain
  torchrun --nproc-per-node 2 -m pretrain train run.yaml --out runs/first parallel.expert_parallel_size=2

Ctrl-C (or SIGTERM) saves a checkpoint after the current step; once more leaves at once.
A RUN_DIR that already has a checkpoint is gone on with: start the same command again. It holds
config.yaml, deepspeed.json, tokenizer.model, metrics.jsonl, tensorboard/, checkpoints/ and logs/."""


def add(subparsers: Subparsers) -> None:
    """Add the command."""
    parser = add_command(
        subparsers,
        "train",
        summary="train, or go on with training",
        examples=_EXAMPLES,
        description="Train the model that a run file describes, on all the ranks that were started.",
    )
    add_run(parser)
    parser.add_argument(
        "--out",
        metavar="RUN_DIR",
        type=Path,
        required=True,
        help="folder of the run; made when it is missing",
    )
    parser.set_defaults(handle=handle)


def handle(args: argparse.Namespace) -> None:
    """Read the run and train it."""
    from pretrain.config.presets import load_run
    from pretrain.config.validate import check
    from pretrain.parallel.deepspeed_config import zero_stage_of

    run = load_run(args.run, args.overrides)
    check(run, started_as()[1], source=args.run, zero_stage=zero_stage_of(run))
    # After judging the run: a mistake in it should be told before torch is loaded.
    from pretrain.train.run import train_command

    train_command(run, args.out)
