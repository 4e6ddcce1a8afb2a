"""Prints what a run needs, and compares it with its dense baseline."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from pretrain.config.presets import load_unchecked_run, run_path, with_vocab_size
from pretrain.config.schema import RunConfig
from pretrain.config.validate import check_run
from pretrain.model.dense_baseline import config_overrides, dense_baseline, resolve_text_tokens
from pretrain.plan.sizes import make_plan
from pretrain.plan.text import format_comparison, format_plan


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """Options of `vlmoe plan`."""

    world_size: int | None
    """Number of ranks; None means `parallel.expert_parallel_size`."""
    text_tokens: float | None
    """Average tokens per caption; None means the default of `resolve_text_tokens`."""
    with_baseline: bool
    """Compare with a dense model of equal FLOPs."""
    offline: bool
    """Open neither the training data nor the tokenizer."""
    as_json: bool


def print_plan(run_file: str, overrides: Sequence[str], options: PlanOptions) -> None:
    """Validate a run and print its plan.

    Raises:
        ConfigError: The run is invalid for this number of ranks, or its settings exclude all
            samples of a source.
        DataError: The training data or the tokenizer cannot be read.
    """
    path = run_path(run_file)
    run, origins = load_unchecked_run(path, overrides)
    run = run if options.offline else with_vocab_size(run)
    world_size = options.world_size or run.parallel.expert_parallel_size
    text_tokens = resolve_text_tokens(options.text_tokens, run.model.context_length)
    # A setting below 1 is reported as such, not as a number of ranks that nobody asked for.
    known_world_size = world_size if world_size > 0 else None
    opens_data = not options.offline and bool(run.data.train or run.data.tokenizer)
    missing = _missing_files(run) if opens_data else []
    check_run(run, known_world_size, source=origins, training=False, more=missing)
    plan = make_plan(run, path, world_size=world_size, text_tokens=text_tokens)
    if opens_data:
        from pretrain.plan.data import plan_data  # imports torch

        plan["data"] = plan_data(run, plan["schedule"]["total_pairs"])
    if not options.with_baseline:
        print(json.dumps(plan, indent=2) if options.as_json else format_plan(run, plan))
        return

    dense = dense_baseline(run, text_tokens=text_tokens)
    check_run(dense, world_size, source=f"the dense baseline of {path}", training=False)
    comparison = {
        "sparse": plan,
        "dense": make_plan(dense, path, world_size=world_size, text_tokens=text_tokens),
        "dense_settings": config_overrides(run, dense),
    }
    if options.as_json:
        print(json.dumps(comparison, indent=2))
    else:
        print(format_comparison(run, dense, comparison))


def _missing_files(run: RunConfig) -> list[str]:
    from pretrain.plan.input_files import input_file_problems  # imports numpy

    missing = input_file_problems(run)
    if missing:
        missing[-1] += "; with --offline, no files are opened"
    return missing
