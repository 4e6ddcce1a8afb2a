"""The commands of the data pipeline: `vlmoe data ...`, or `python -m data_pipeline ...` without the
trainer.

Heavy imports happen inside the handlers, so that help answers at once.
"""

from __future__ import annotations

from data_pipeline.commands import check, dedup, filter, index, ledger, peek, stats, write
from data_pipeline.common.commands import Subparsers

_COMMANDS = (write, index, check, peek, stats, dedup, filter, ledger)
"""In the order in which they are used."""


def add_all(subparsers: Subparsers) -> None:
    """Add every command that works on shards."""
    for command in _COMMANDS:
        command.add(subparsers)
