"""Runs a command of the data pipeline in this process: `data("check", folder)` is `vlmoe data check
FOLDER`."""

from __future__ import annotations

import argparse
from pathlib import Path

from data_pipeline.commands import add_all, tokenizer


def data(*words: str | Path | int) -> int:
    """The exit status; errors that a person can mend are raised, and output goes where it goes."""
    parser = argparse.ArgumentParser()
    subparsers = parser.add_subparsers(required=True)
    add_all(subparsers)
    tokenizer.add(subparsers)
    args = parser.parse_args([str(word) for word in words])
    return int(args.handle(args) or 0)
