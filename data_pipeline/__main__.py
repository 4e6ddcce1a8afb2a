"""`python -m data_pipeline COMMAND ...`: the commands of the data pipeline, without the trainer."""

from __future__ import annotations

import sys

from data_pipeline.commands import add_all, tokenizer
from data_pipeline.common.commands import (
    CommandParser,
    escape_unencodable_output,
    print_error,
)
from data_pipeline.common.errors import VlmError
from data_pipeline.common.logs import setup_logging


def main() -> int:
    """Run one command; returns the exit status, which is 2 for a `VlmError`."""
    escape_unencodable_output()
    parser = CommandParser(
        prog="python -m data_pipeline",
        allow_abbrev=False,
        description="Create, check and inspect WebDataset shards of image-text pairs.",
    )
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    add_all(subparsers)
    tokenizer.add(subparsers)
    args = parser.parse_args()
    setup_logging(0)
    try:
        return int(args.handle(args) or 0)
    except VlmError as error:
        print_error(str(error))
        return 2


if __name__ == "__main__":
    sys.exit(main())
