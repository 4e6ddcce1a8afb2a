"""`vlmoe train`: trains a run, or resumes it."""

from __future__ import annotations

import argparse
from pathlib import Path

from data_pipeline.common.commands import Subparsers, add_command
from pretrain.cli.common import add_run_arguments, launched_rank_and_world_size

_EXAMPLES = """\
  vlmoe train run.yaml --out runs/first
  vlmoe train run.yaml --out runs/first optim.lr=3e-4 parallel.engine=plain
  torchrun --nproc-per-node 2 -m pretrain train run.yaml --out runs/first \
parallel.expert_parallel_size=2

To resume, run the same command again: training continues from the last checkpoint in RUN_DIR.
Ctrl-C or SIGTERM saves a checkpoint after the current step and exits; a second one exits at once.

Contents of RUN_DIR: config.yaml, deepspeed.json, tokenizer.model, metrics.jsonl, tensorboard/,
checkpoints/ and logs/."""


def add(subparsers: Subparsers) -> None:
    """Add the command."""
    parser = add_command(
        subparsers,
        "train",
        summary="train a model, or resume training",
        examples=_EXAMPLES,
        description="Train the model of a run file on all ranks that the launcher started.",
    )
    add_run_arguments(parser)
    parser.add_argument(
        "--out",
        metavar="RUN_DIR",
        type=Path,
        required=True,
        help="run folder; created if it does not exist (required)",
    )
    parser.set_defaults(handle=handle)


def handle(args: argparse.Namespace) -> None:
    """Run the command."""
    from pretrain.config.presets import load_unchecked_run, with_vocab_size
    from pretrain.config.validate import check_run
    from pretrain.plan.input_files import input_file_problems, with_saved_tokenizer

    run, origins = load_unchecked_run(args.run, args.overrides)
    run = with_vocab_size(with_saved_tokenizer(run, args.out))
    _, world_size = launched_rank_and_world_size()
    check_run(run, world_size, source=origins, more=input_file_problems(run))
    # Imported after validation: an error in the run is reported before torch is loaded.
    from pretrain.train.run import train_command

    train_command(run, args.out)
