"""The command `vlmoe`: finds the sub-command, and turns errors a person can mend into one line.

Heavy imports (torch, DeepSpeed) happen inside the handlers, so that help and `plan` answer at once.
"""

from __future__ import annotations

import argparse
import errno
import logging
import os
import sys
import time
from collections.abc import Sequence
from typing import NoReturn

from data_pipeline.commands import tokenizer
from data_pipeline.common.errors import LostRankError, VlmError
from data_pipeline.common.logs import note_in_files, setup_logging
from pretrain.cli import caption, check_parallel, data, eval, plan, routing, settings, train
from pretrain.cli.common import started_as

_COMMANDS = (train, plan, settings, check_parallel, eval, caption, routing, data, tokenizer)

_RANK_ZERO_FIRST_SECONDS, _CAUSE_FIRST_SECONDS = 2.0, 5.0
"""How long an error waits for one that says more. Ranks usually fail alike, and the launcher ends
the others as soon as one has ended: so a person reads rank 0's error and not the same a hundred
times."""

_DISK_ERRORS = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space",
    errno.EACCES: "check its permissions",
    errno.EROFS: "choose a folder that can be written",
    errno.ENOTDIR: "choose another path",
    errno.EISDIR: "choose another path",
    errno.EEXIST: "choose another path",
}
"""What the system says about files that a person can mend, and how."""


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command."""
    parser = argparse.ArgumentParser(
        prog="vlmoe",
        allow_abbrev=False,
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
        The exit status: 0, or 2 when something outside the program is wrong. Other errors are bugs
        and are raised.
    """
    args = _parse(argv)
    rank = started_as()[0]
    setup_logging(rank, logging.DEBUG if args.verbose else None)
    try:
        return int(args.handle(args) or 0)
    except VlmError as error:
        _tell(str(error), rank, _CAUSE_FIRST_SECONDS if isinstance(error, LostRankError) else 0.0)
        return 2
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        _tell(
            f"{error.filename or 'a file'}: {error.strerror}; {_DISK_ERRORS[error.errno]}",
            rank,
            0.0,
        )
        return 2


def _tell(message: str, rank: int, wait_seconds: float) -> None:
    """Print an error: at once on rank 0, on others when rank 0 had its time to do so."""
    note_in_files(message)  # also if the launcher ends this rank while it waits
    time.sleep(max(wait_seconds, _RANK_ZERO_FIRST_SECONDS if rank else 0.0))
    who = f" (rank {rank})" if started_as()[1] > 1 else ""
    print(f"error{who}: {message}", file=sys.stderr)


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
