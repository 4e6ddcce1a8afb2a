"""The `vlmoe` command: dispatches to sub-commands and prints expected errors as one line.

Heavy imports (torch, DeepSpeed) happen inside the handlers, so that `--help` and `plan` are fast.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import logging
import os
import sys
import time
from collections.abc import Sequence
from typing import NoReturn

from data_pipeline.commands import tokenizer
from data_pipeline.common.commands import (
    CommandParser,
    escape_unencodable_output,
    print_error,
)
from data_pipeline.common.errors import VlmError
from data_pipeline.common.escaping import escape_control
from data_pipeline.common.logs import log_to_files_only, setup_logging
from pretrain import __version__
from pretrain.cli import caption, data, eval, parity, plan, routing, settings, train
from pretrain.cli.common import launched_rank_and_world_size
from pretrain.parallel.errors import LostRankError

_COMMANDS = (train, plan, settings, parity, eval, caption, routing, data, tokenizer)

_OTHER_RANK_DELAY_SECONDS, _LOST_RANK_DELAY_SECONDS = 2.0, 5.0
"""Delays before printing an error: on ranks other than 0, and of a `LostRankError`.

Ranks usually fail with the same error, and the launcher terminates the others as soon as one has
exited. The delay gives rank 0, or the rank that caused the error, time to print it first.
"""

_FILE_ERRORS = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space",
    errno.EACCES: "check its permissions",
    errno.EROFS: "choose a writable folder",
    errno.ENOTDIR: "choose another path",
    errno.EISDIR: "choose another path",
    errno.EEXIST: "choose another path",
}
"""Operating system errors that are not bugs, with advice."""


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = CommandParser(
        prog="vlmoe",
        allow_abbrev=False,
        description="Pretrain sparse mixture-of-experts vision-language models.",
        epilog="`vlmoe COMMAND --help` shows the options and examples of a command.",
    )
    parser.add_argument("--version", action="version", version=f"vlmoe {__version__}")
    parser.add_argument("-v", "--verbose", action="store_true", help="log at level DEBUG")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in _COMMANDS:
        command.add(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: Arguments without the program's name; None uses those of the process.

    Returns:
        The exit status: that of the command (0 by default), or 2 for an expected error
        (`VlmError`, full disk, missing permission). Other exceptions are bugs and propagate.
    """
    escape_unencodable_output()
    args = _parse(argv)
    rank = launched_rank_and_world_size()[0]
    setup_logging(rank, logging.DEBUG if args.verbose else None)
    try:
        return int(args.handle(args) or 0)
    except VlmError as error:
        is_consequence = isinstance(error, LostRankError)
        _print_error(str(error), rank, _LOST_RANK_DELAY_SECONDS if is_consequence else 0.0)
        return 2
    except OSError as error:
        if error.errno not in _FILE_ERRORS:
            raise
        message = f"{error.filename or 'a file'}: {error.strerror}; {_FILE_ERRORS[error.errno]}"
        _print_error(message, rank, 0.0)
        return 2


def _print_error(message: str, rank: int, delay_seconds: float) -> None:
    """Print an error, on ranks other than 0 after a delay."""
    log_to_files_only(message)  # before the delay: the launcher may terminate this rank during it
    time.sleep(max(delay_seconds, _OTHER_RANK_DELAY_SECONDS if rank else 0.0))
    _write_error_file(message)
    suffix = f" (rank {rank})" if launched_rank_and_world_size()[1] > 1 else ""
    print_error(message, label=f"error{suffix}")


def _write_error_file(message: str) -> None:
    """Write the error where torchrun reads it, so that it ends its report of the failure with it
    (format: `torch.distributed.elastic.multiprocessing.errors.ProcessFailure`)."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE", "")
    if not path:
        return
    # Best effort: the message is printed in any case.
    with contextlib.suppress(OSError), open(path, "w", encoding="utf-8") as file:
        content = {"message": escape_control(message, lines=True), "timestamp": int(time.time())}
        json.dump(content, file)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    args, rest = build_parser().parse_known_args(argv)
    # argparse ends a list of positional arguments at the first option after it, but overrides
    # are also accepted after options: `train run.yaml --out DIR optim.lr=1e-4`.
    if rest and args.takes_overrides and not any(argument.startswith("-") for argument in rest):
        args.overrides = [*args.overrides, *rest]
    elif rest:
        files = [argument for argument in rest if os.path.lexists(argument)]
        hint = f"; write ./{files[0]} for the file of that name" if files else ""
        args.parser.error(f"unrecognized arguments: {' '.join(rest)}{hint}")
    return args


def run() -> NoReturn:
    """Entry point of the console command: `main`, with closed pipes and Ctrl-C handled."""
    try:
        status = main()
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader (`| head`) has exited. Without the redirection Python would print another
        # error when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    except KeyboardInterrupt:
        status = 130
    sys.exit(status)
