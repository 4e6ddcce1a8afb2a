"""`python -m pretrain` is the command `vlmoe`."""

from __future__ import annotations

from pretrain.cli.main import run

run()
