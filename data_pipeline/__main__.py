"""`python -m data_pipeline COMMAND ...`: the commands of the data pipeline, without a trainer."""

from __future__ import annotations

import argparse
import sys

from data_pipeline.commands import add_all, tokenizer
from data_pipeline.common.errors import VlmError
from data_pipeline.common.logs import setup_logging


def main() -> int:
    """Run one command; the exit status is 2 when something outside the program is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m data_pipeline",
        allow_abbrev=False,
        description="Make, check and look at WebDataset shards of image-text pairs.",
    )
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    add_all(subparsers)
    tokenizer.add(subparsers)
    args = parser.parse_args()
    setup_logging(0)
    try:
        return int(args.handle(args) or 0)
    except VlmError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
