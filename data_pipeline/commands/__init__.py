"""The commands `vlmoe data ...`; without the trainer installed, `python -m data_pipeline ...`.

Heavy imports are inside the handlers, so that `--help` is fast.
"""

from __future__ import annotations

from data_pipeline.commands import check, dedup, filter, index, ledger, peek, stats, write
from data_pipeline.common.commands import Subparsers

_COMMANDS = (write, index, check, peek, stats, dedup, filter, ledger)
"""In the order of a typical workflow."""


def add_all(subparsers: Subparsers) -> None:
    """Add all commands for shards."""
    for command in _COMMANDS:
        command.add(subparsers)
