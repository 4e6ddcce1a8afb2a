"""`vlmoe plan`: size, FLOPs, batch sizes, layout and data of a run; needs no GPU or DeepSpeed."""

from __future__ import annotations

import argparse

from data_pipeline.common.commands import Subparsers, add_command
from pretrain.cli.common import add_run_arguments
from pretrain.model.dense_baseline import DEFAULT_TEXT_TOKENS

_EXAMPLES = """\
  vlmoe plan b16 --world-size 64
  vlmoe plan run.yaml --world-size 8 parallel.expert_parallel_size=8 parallel.deepspeed=zero2
  vlmoe plan l16 --world-size 128 --json
  vlmoe plan b16 --dense-baseline
  vlmoe plan run.yaml --offline        where the data is not accessible

If the run names training data or a tokenizer, they are opened: the vocabulary is compared with the
model's, and some samples of every source are processed as in training. Nothing is opened with
--offline."""


def add(subparsers: Subparsers) -> None:
    """Add the command."""
    parser = add_command(
        subparsers,
        "plan",
        summary="validate a run and show its size, batch, layout, data and DeepSpeed settings",
        description="Validate a run file and show the number of parameters, FLOPs, the batch\n"
        "sizes, the parallel layout, the data and the resolved DeepSpeed settings. Nothing is\n"
        "trained.",
        examples=_EXAMPLES,
    )
    add_run_arguments(parser)
    parser.add_argument(
        "--world-size",
        metavar="N",
        type=int,
        default=None,
        help="number of ranks (default: parallel.expert_parallel_size, usually 1)",
    )
    parser.add_argument(
        "--text-tokens",
        metavar="N",
        type=float,
        default=None,
        help=f"average tokens per caption, for the FLOPs (default: {DEFAULT_TEXT_TOKENS}, at most "
        f"model.context_length)",
    )
    parser.add_argument(
        "--dense-baseline",
        action="store_true",
        help="compare with a dense model of equal FLOPs, and print the settings of that model",
    )
    parser.add_argument(
        "--offline", action="store_true", help="do not open the training data and the tokenizer"
    )
    parser.add_argument("--json", action="store_true", help="print a JSON object instead of text")
    parser.set_defaults(handle=handle)


def handle(args: argparse.Namespace) -> None:
    """Run the command."""
    if args.world_size is not None and args.world_size < 1:
        args.parser.error(f"--world-size is {args.world_size}, but must be at least 1")
    from pretrain.plan.command import PlanOptions, print_plan

    options = PlanOptions(
        world_size=args.world_size,
        text_tokens=args.text_tokens,
        with_baseline=args.dense_baseline,
        offline=args.offline,
        as_json=args.json,
    )
    print_plan(args.run, args.overrides, options)
