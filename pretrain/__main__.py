"""`python -m pretrain` runs the command `vlmoe`."""

from __future__ import annotations

from pretrain.cli.main import run

run()
