"""`vlmoe plan`: size, FLOPs, batch sizes and layout of a run; needs no GPU, DeepSpeed or data."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from data_pipeline.common.commands import Subparsers, add_command
from data_pipeline.common.config import to_mapping
from pretrain.cli.common import add_run_arguments
from pretrain.cli.plan_text import format_comparison, format_plan
from pretrain.config.batch import plan_batch
from pretrain.config.presets import load_unchecked_run, run_path
from pretrain.config.schema import RunConfig
from pretrain.config.validate import check_run
from pretrain.model.count import count_flops, count_parameters
from pretrain.model.dense_baseline import (
    DEFAULT_TEXT_TOKENS,
    config_overrides,
    dense_baseline,
    resolve_text_tokens,
)
from pretrain.parallel.deepspeed_config import profile_path, resolve_for_run, zero_stage_of

_EXAMPLES = """\
  vlmoe plan b16 --world-size 64
  vlmoe plan run.yaml --world-size 8 parallel.expert_parallel_size=8 parallel.deepspeed=zero2
  vlmoe plan l16 --world-size 128 --json
  vlmoe plan b16 --dense-baseline"""


def add(subparsers: Subparsers) -> None:
    """Add the command."""
    parser = add_command(
        subparsers,
        "plan",
        summary="validate a run and show its size, batch, layout and DeepSpeed settings",
        description="Validate a run file and show the number of parameters, FLOPs, the batch\n"
        "sizes, the parallel layout and the resolved DeepSpeed settings. Nothing is trained.",
        examples=_EXAMPLES,
    )
    add_run_arguments(parser)
    parser.add_argument(
        "--world-size",
        metavar="N",
        type=int,
        default=None,
        help="number of ranks (default: parallel.expert_parallel_size, usually 1)",
    )
    parser.add_argument(
        "--text-tokens",
        metavar="N",
        type=float,
        default=None,
        help=f"average tokens per caption, for the FLOPs (default: {DEFAULT_TEXT_TOKENS}, at most "
        f"model.context_length)",
    )
    parser.add_argument(
        "--dense-baseline",
        action="store_true",
        help="compare with a dense model of equal FLOPs, and print the settings of that model",
    )
    parser.add_argument("--json", action="store_true", help="print a JSON object instead of text")
    parser.set_defaults(handle=handle)


def handle(args: argparse.Namespace) -> None:
    """Run the command."""
    if args.world_size is not None and args.world_size < 1:
        args.parser.error(f"--world-size is {args.world_size}, but must be at least 1")
    path = run_path(args.run)
    run = load_unchecked_run(path, args.overrides)
    world_size = run.parallel.expert_parallel_size if args.world_size is None else args.world_size
    text_tokens = resolve_text_tokens(args.text_tokens, run.model.context_length)
    check_run(run, world_size, source=str(path), training=False, zero_stage=zero_stage_of(run))
    plan = make_plan(run, path, world_size=world_size, text_tokens=text_tokens)

    if not args.dense_baseline:
        print(json.dumps(plan, indent=2) if args.json else format_plan(run, plan))
        return

    dense = dense_baseline(run, text_tokens=text_tokens)
    check_run(dense, world_size, source=f"the dense baseline of {path}", training=False)
    comparison = {
        "sparse": plan,
        "dense": make_plan(dense, path, world_size=world_size, text_tokens=text_tokens),
        "dense_settings": config_overrides(run, dense),
    }
    if args.json:
        print(json.dumps(comparison, indent=2))
    else:
        print(format_comparison(run, dense, comparison))


def make_plan(run: RunConfig, path: Path, *, world_size: int, text_tokens: float) -> dict[str, Any]:
    """What `vlmoe plan` shows of a run, as JSON values. A pair is an image with its caption.

    Args:
        run: A valid run.
        path: The run file.
        world_size: Number of ranks.
        text_tokens: Average tokens per caption.

    Raises:
        ConfigError: The DeepSpeed profile is missing or contradicts the run.
    """
    batch = plan_batch(run.batch.global_batch_size, run.batch.micro_batch_size, world_size)
    parameters = count_parameters(run.model, run.moe)
    flops = count_flops(run.model, run.moe, text_tokens=text_tokens)
    uses_deepspeed = run.parallel.engine == "deepspeed"
    moe_blocks = list(run.moe.blocks(run.model.num_layers))
    total_pairs = run.schedule.total_steps * batch.global_batch_size

    return {
        "run": str(path),
        "name": run.name,
        "params": {
            "total": parameters.total,
            "active": parameters.active,
            "trunk_total": parameters.trunk_total,
            "trunk_active": parameters.trunk_active,
            "embeddings": parameters.embeddings,
            "heads": parameters.heads,
        },
        "flops_per_pair": {
            "forward": round(flops.forward),
            "training": round(flops.training),
            "patches": run.model.num_patches,
            "text_tokens": text_tokens,
        },
        "batch": batch._asdict(),
        "schedule": {
            "total_steps": run.schedule.total_steps,
            "total_pairs": total_pairs,
            "total_flops": round(
                flops.training * run.schedule.total_steps * batch.global_batch_size
            ),
        },
        "layout": {
            "world_size": world_size,
            "expert_parallel_size": run.parallel.expert_parallel_size,
            "expert_copies": world_size // run.parallel.expert_parallel_size,
            "experts_per_rank": run.moe.num_experts // run.parallel.expert_parallel_size,
            "moe_blocks": moe_blocks,
        },
        "routing": to_mapping(run.moe) if moe_blocks else None,
        "balance": to_mapping(run.balance) if moe_blocks else None,
        "deepspeed_profile": str(profile_path(run.parallel.deepspeed)) if uses_deepspeed else None,
        "deepspeed": resolve_for_run(run, path, batch) if uses_deepspeed else None,
    }
