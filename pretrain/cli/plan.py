"""`vlmoe plan`: what a run would be, from arithmetic alone: no GPU, no DeepSpeed, no data."""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path
from typing import Any

from data_pipeline.common.commands import Subparsers, add_command
from data_pipeline.common.config import to_mapping
from pretrain.cli.common import add_run
from pretrain.config.batch import plan_batch
from pretrain.config.presets import load_run, run_path
from pretrain.config.schema import RunConfig
from pretrain.config.validate import check
from pretrain.model.count import count_flops, count_parameters
from pretrain.model.dense_baseline import (
    USUAL_TEXT_TOKENS,
    caption_tokens,
    dense_baseline,
    settings_that_differ,
)
from pretrain.parallel.deepspeed_config import profile_path, resolve_for, zero_stage_of

_EXAMPLES = """\
  vlmoe plan b16 --world-size 64
  vlmoe plan run.yaml --world-size 8 parallel.expert_parallel_size=8 parallel.deepspeed=zero2
  vlmoe plan l16 --world-size 128 --json
  vlmoe plan b16 --twin"""


def add(subparsers: Subparsers) -> None:
    """Add the command."""
    parser = add_command(
        subparsers,
        "plan",
        summary="show parameters, FLOPs, batch, layout and DeepSpeed settings of a run",
        description="Show what a run would be, and everything that is wrong with it, without starting it.",
        examples=_EXAMPLES,
    )
    add_run(parser)
    parser.add_argument(
        "--world-size",
        metavar="N",
        type=int,
        default=None,
        help="number of ranks (default: as many as share the experts, usually 1)",
    )
    parser.add_argument(
        "--text-tokens",
        metavar="N",
        type=float,
        default=None,
        help=f"average tokens of a caption, for the FLOPs (default: {USUAL_TEXT_TOKENS}, at most "
        f"model.context_length)",
    )
    parser.add_argument(
        "--twin",
        action="store_true",
        help="show the dense model of equal active FLOPs beside it, and the settings that make it",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    parser.set_defaults(handle=handle)


def handle(args: argparse.Namespace) -> None:
    """Read, check, count and print."""
    if args.world_size is not None and args.world_size < 1:
        args.parser.error(f"--world-size is {args.world_size}, but must be at least 1")
    path = run_path(args.run)
    run = load_run(path, args.overrides)
    world_size = run.parallel.expert_parallel_size if args.world_size is None else args.world_size
    text_tokens = caption_tokens(args.text_tokens, run.model.context_length)
    check(run, world_size, source=str(path), training=False, zero_stage=zero_stage_of(run))
    facts = plan(run, path, world_size=world_size, text_tokens=text_tokens)
    if args.twin:
        twin = dense_baseline(run, text_tokens=text_tokens)
        check(twin, world_size, source=f"the dense twin of {path}", training=False)
        both = {
            "sparse": facts,
            "twin": plan(twin, path, world_size=world_size, text_tokens=text_tokens),
            "twin_settings": settings_that_differ(run, twin),
        }
        print(json.dumps(both, indent=2) if args.json else _render_twin(run, twin, both))
        return
    print(json.dumps(facts, indent=2) if args.json else _render(run, facts))


def plan(run: RunConfig, path: Path, *, world_size: int, text_tokens: float) -> dict[str, Any]:
    """All facts about a run, as plain values.

    Args:
        run: A run that `check` has passed.
        path: Its file.
        world_size: Number of ranks.
        text_tokens: Average tokens of a caption.

    Raises:
        ConfigError: The DeepSpeed profile is missing or contradicts the run.
    """
    batch = plan_batch(run.batch.global_batch_size, run.batch.micro_batch_size, world_size)
    parameters = count_parameters(run.model, run.moe)
    flops = count_flops(run.model, run.moe, text_tokens=text_tokens)
    uses_deepspeed = run.parallel.engine == "deepspeed"
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
            "total_pairs": run.schedule.total_steps * batch.global_batch_size,
            "total_flops": round(
                flops.training * run.schedule.total_steps * batch.global_batch_size
            ),
        },
        "layout": {
            "world_size": world_size,
            "expert_parallel_size": run.parallel.expert_parallel_size,
            "expert_copies": world_size // run.parallel.expert_parallel_size,
            "experts_per_rank": run.moe.num_experts // run.parallel.expert_parallel_size,
            "moe_blocks": list(run.moe.blocks(run.model.num_layers)),
        },
        "routing": to_mapping(run.moe) if run.moe.blocks(run.model.num_layers) else None,
        "balance": to_mapping(run.balance) if run.moe.blocks(run.model.num_layers) else None,
        "deepspeed_profile": str(profile_path(run.parallel.deepspeed)) if uses_deepspeed else None,
        "deepspeed": resolve_for(run, path, batch) if uses_deepspeed else None,
    }


def _render(run: RunConfig, facts: dict[str, Any]) -> str:
    """The facts for a person."""
    params, flops, batch = facts["params"], facts["flops_per_pair"], facts["batch"]
    schedule, layout = facts["schedule"], facts["layout"]
    sparse = len(layout["moe_blocks"])
    lines = [
        ("run", f"{facts['name']} ({_near(facts['run'])})"),
        (
            "parameters",
            f"{_short(params['total'])} total, {_short(params['active'])} active per token",
        ),
        (
            "  trunk",
            f"{_short(params['trunk_total'])} total, {_short(params['trunk_active'])} active per token",
        ),
        ("  rest", f"{_short(params['embeddings'])} embeddings, {_short(params['heads'])} heads"),
        ("blocks", f"{run.model.num_layers}, {sparse} of them with experts"),
        *(_routing_lines(run) if sparse else []),
        (
            "FLOPs",
            f"{_short(flops['training'])} per pair ({_short(flops['forward'])} forward), for "
            f"{flops['patches']} patches and {flops['text_tokens']:g} text tokens",
        ),
        (
            "batch",
            f"{batch['global_batch_size']:,} pairs a step = {batch['micro_batch_size']:,} a forward pass x "
            f"{_count(batch['data_ranks'], 'rank')} x "
            f"{_count(batch['accumulation_steps'], 'accumulation step')}",
        ),
        (
            "schedule",
            f"{schedule['total_steps']:,} steps, {_short(schedule['total_pairs'])} pairs, "
            f"{_short(schedule['total_flops'])} FLOPs; {run.schedule.kind}, peak lr {run.optim.lr:g}, "
            f"{run.schedule.warmup_steps:,} steps of warm-up",
        ),
        ("layout", f"{_count(layout['world_size'], 'rank')}; {_experts(layout)}"),
        ("precision", run.precision.compute),
        (
            "DeepSpeed",
            _near(facts["deepspeed_profile"])
            if facts["deepspeed_profile"]
            else "not used (parallel.engine is plain)",
        ),
    ]
    text = "\n".join(f"{name:<12} {value}" for name, value in lines)
    return text + (f"\n{json.dumps(facts['deepspeed'], indent=2)}" if facts["deepspeed"] else "")


def _routing_lines(run: RunConfig) -> list[tuple[str, str]]:
    """Experts, how tokens come to them, and what keeps them in use: what is not at rest."""
    moe, balance = run.moe, run.balance
    places = (
        f"capacity {moe.capacity_factor:g} by {moe.capacity_priority}"
        if moe.capacity_factor
        else "dropless"
    )
    weights = "renormalized" if moe.norm_topk_prob and moe.top_k > 1 else "raw weights"
    routing = [f"{moe.score_func} scores", f"choice {moe.routing}", weights, places]
    routing += [f"{moe.image_pool} experts for patches"] if moe.pools == "modality" else []
    routing += ["gate reads the caption"] if moe.router_input == "caption" else []
    terms = []
    for name, weight in to_mapping(balance).items():
        values = weight if isinstance(weight, dict) else {"": weight}
        terms += [
            f"{' '.join(filter(None, (name.removesuffix('_weight'), modality)))} {value:g}"
            for modality, value in values.items()
            if name.endswith("_weight") and value
        ]
    if balance.bias != "none":
        terms.append(
            f"{balance.bias} bias{' of each modality' if balance.bias_per_modality else ''}, "
            f"rate {balance.bias_rate:g}"
        )
    return [
        (
            "experts",
            f"{moe.num_experts} routed + {moe.shared_experts} shared a layer, "
            f"{moe.top_k} routed per token",
        ),
        ("routing", ", ".join(routing)),
        ("balancing", ", ".join(terms) or "none"),
    ]


def _render_twin(run: RunConfig, twin: RunConfig, both: dict[str, Any]) -> str:
    """A run and its dense twin side by side."""
    rows = [("", "sparse", "dense twin", "twin / sparse")]
    for name, section, key in (
        ("parameters", "params", "total"),
        ("  active per token", "params", "active"),
        ("  trunk", "params", "trunk_total"),
        ("  trunk, active", "params", "trunk_active"),
        ("FLOPs per pair", "flops_per_pair", "training"),
        ("  forward", "flops_per_pair", "forward"),
        ("FLOPs of the run", "schedule", "total_flops"),
    ):
        sparse, dense = both["sparse"][section][key], both["twin"][section][key]
        rows.append((name, _short(sparse), _short(dense), f"{dense / sparse:.4f}"))
    sparse_blocks = len(both["sparse"]["layout"]["moe_blocks"])
    rows.append(("blocks with experts", str(sparse_blocks), "0", ""))
    rows.append(("dense width", str(run.model.ffn_width), str(twin.model.ffn_width), ""))
    flops = both["sparse"]["flops_per_pair"]
    lines = [f"{a:<20}{b:>12}{c:>12}{d:>15}".rstrip() for a, b, c, d in rows]
    lines.append(f"for {flops['patches']} patches and {flops['text_tokens']:g} text tokens a pair")
    return "\n".join([*lines, f"settings of the twin: {shlex.join(both['twin_settings'])}"])


def _near(path: str) -> str:
    """A path from here, when it lies below."""
    full, here = Path(path).resolve(), Path.cwd()
    return str(full.relative_to(here)) if full.is_relative_to(here) else path


def _experts(layout: dict[str, Any]) -> str:
    """How the experts lie over the ranks, in words."""
    ranks, copies = (
        layout["expert_parallel_size"],
        _count(layout["expert_copies"], "copy", "copies"),
    )
    if ranks == 1:
        return f"every rank holds all experts ({copies})"
    groups = [f"{first}-{first + ranks - 1}" for first in range(0, layout["world_size"], ranks)]
    shown = ", ".join(groups if len(groups) <= 4 else [*groups[:2], "...", groups[-1]])
    return (
        f"{_count(layout['experts_per_rank'], 'expert')} of each layer a rank, {copies} of the experts, "
        f"on ranks {shown}"
    )


def _count(number: int, singular: str, plural: str = "") -> str:
    return f"{number:,} {singular if number == 1 else plural or singular + 's'}"


def _short(number: float) -> str:
    """Four figures and a unit: 461.5M."""
    for limit, unit in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.4g}{unit}"
    return f"{number:.4g}"
