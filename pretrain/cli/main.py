"""The command `vlmoe`: finds the sub-command, and turns errors a person can mend into one line.

Heavy imports (torch, DeepSpeed) happen inside the handlers, so that help and `plan` answer at once.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from data_pipeline.common.errors import VlmError
from data_pipeline.common.logs import setup_logging
from pretrain.cli import caption, data, eval, plan, tokenizer, train

_COMMANDS = (train, plan, eval, caption, data, tokenizer)


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command."""
    parser = argparse.ArgumentParser(
        prog="vlmoe", allow_abbrev=False,
        description="Pretrain sparse mixture-of-experts vision-language models.",
        epilog="`vlmoe COMMAND --help` says more about a command, with examples.",
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="log details too")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in _COMMANDS:
        command.add(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: Arguments without the program's name; None takes those of the process.

    Returns:
        The exit status: 0, or 2 when something outside the program is wrong. Other errors are bugs and
        are raised.
    """
    args = _parse(argv)
    rank = int(os.environ.get("RANK", "0"))
    setup_logging(rank, logging.DEBUG if args.verbose else None)
    try:
        return int(args.handle(args) or 0)
    except VlmError as error:
        who = f" (rank {rank})" if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""
        print(f"error{who}: {error}", file=sys.stderr)
        return 2


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    args, rest = build_parser().parse_known_args(argv)
    # argparse closes a list of positional arguments at the first option after it, but
    # `train run.yaml --out DIR optim.lr=1e-4` is what people write.
    if rest and args.takes_overrides and not any(word.startswith("-") for word in rest):
        args.overrides = [*args.overrides, *rest]
    elif rest:
        args.parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return args


def run() -> NoReturn:
    """The console command: `main`, with the manners of a program in a pipe."""
    try:
        status = main()
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader (`| head`) has enough. Python would complain once more when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    except KeyboardInterrupt:
        status = 130
    sys.exit(status)
