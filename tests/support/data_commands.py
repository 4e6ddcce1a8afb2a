"""Runs commands of the data pipeline in this process.

`run_data_command("check", folder)` is `vlmoe data check FOLDER`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from data_pipeline.commands import add_all, tokenizer


def run_data_command(*arguments: str | Path | int) -> int:
    """Run a command and return its exit status; a VlmError is raised instead of printed."""
    parser = argparse.ArgumentParser()
    subparsers = parser.add_subparsers(required=True)
    add_all(subparsers)
    tokenizer.add(subparsers)
    args = parser.parse_args([str(argument) for argument in arguments])
    return int(args.handle(args) or 0)
