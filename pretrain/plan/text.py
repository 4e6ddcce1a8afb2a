"""The output of `vlmoe plan` as text."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from data_pipeline.common.config import to_mapping
from data_pipeline.common.escaping import escape_control
from data_pipeline.common.tables import counted, format_rows, format_table, join_counts
from pretrain.config.schema import RunConfig


def format_plan(run: RunConfig, plan: dict[str, Any]) -> str:
    """One line per topic, then the resolved DeepSpeed settings as JSON."""
    moe_blocks, profile = plan["layout"]["moe_blocks"], plan["deepspeed_profile"]
    lines = [
        ("run", f"{plan['name']} ({_relative_path(plan['run'])})"),
        *_model_lines(run, plan),
        *(_routing_lines(run) if moe_blocks else []),
        *_training_lines(run, plan),
        *_data_lines(plan.get("data") or {}),
        (
            "layout",
            f"{counted(plan['layout']['world_size'], 'rank')}; {_layout(plan['layout'])}",
        ),
        ("precision", run.precision.compute),
        (
            "DeepSpeed",
            _relative_path(profile) if profile else "not used (parallel.engine is plain)",
        ),
    ]
    text = format_rows(lines)
    return text + (f"\n{json.dumps(plan['deepspeed'], indent=2)}" if plan["deepspeed"] else "")


def _model_lines(run: RunConfig, plan: dict[str, Any]) -> list[tuple[str, str]]:
    params = {name: _short(number) for name, number in plan["params"].items()}
    num_sparse = len(plan["layout"]["moe_blocks"])
    return [
        ("parameters", f"{params['total']} total, {params['active']} active per token"),
        ("  trunk", f"{params['trunk_total']} total, {params['trunk_active']} active per token"),
        ("  rest", f"{params['embeddings']} embeddings, {params['heads']} heads"),
        ("layers", f"{run.model.num_layers}, {num_sparse} of them with experts"),
    ]


def _training_lines(run: RunConfig, plan: dict[str, Any]) -> list[tuple[str, str]]:
    flops, batch, schedule = plan["flops_per_pair"], plan["batch"], plan["schedule"]
    return [
        (
            "FLOPs",
            f"{_short(flops['training'])} per pair ({_short(flops['forward'])} forward), for "
            f"{flops['patches']} patches and {flops['text_tokens']:g} text tokens",
        ),
        (
            "batch",
            f"{batch['global_batch_size']:,} pairs per step = {batch['micro_batch_size']:,} per "
            f"micro-batch x {counted(batch['data_parallel_size'], 'rank')} x "
            f"{counted(batch['accumulation_steps'], 'accumulation step')}",
        ),
        (
            "schedule",
            f"{counted(schedule['total_steps'], 'step')}, {_short(schedule['total_pairs'])} pairs, "
            f"{_short(schedule['total_flops'])} FLOPs; {run.schedule.kind}, peak lr "
            f"{run.optim.lr:g}, {counted(run.schedule.num_warmup_steps, 'warmup step')}",
        ),
    ]


def _data_lines(data: dict[str, Any]) -> list[tuple[str, str]]:
    """Tokenizer and sources, if the run names any."""
    lines = []
    if tokenizer := data.get("tokenizer"):
        path = escape_control(_relative_path(tokenizer["path"]))
        lines.append(("tokenizer", f"{path}, {counted(tokenizer['tokens'], 'token')}"))
    for source in data.get("sources", ()):
        shards = counted(source["shards"], "shard")
        if source["pairs"] is None:
            parts = [f"{shards} without a manifest, so its pairs are not known"]
        else:
            parts = [f"{counted(source['pairs'], 'pair')} in {shards}"]
        if source["epochs"] is not None:
            parts.append(f"read {source['epochs']:.3g} times")
        if tried := source["tried"]:
            skipped = join_counts(source["skipped"])
            parts.append(f"{source['mean_tokens']:.1f} tokens per caption")
            parts.append(f"of {tried} tried: {skipped} skipped" if skipped else "")
            parts.append(f"{source['truncated']} captions truncated" if source["truncated"] else "")
        name = escape_control(f"source {source['name']}")
        lines.append((name, "; ".join(filter(None, parts))))
    return lines


def _routing_lines(run: RunConfig) -> list[tuple[str, str]]:
    """Experts, routing options, and the active auxiliary losses and biases."""
    moe = run.moe
    capacity = "dropless"
    if moe.uses_capacity:
        capacity = f"capacity {moe.capacity_factor:g} by {moe.capacity_priority}"
    normalized = moe.norm_topk_prob and moe.top_k > 1

    routing = [f"{moe.score_func} scores", f"{moe.routing} routing"]
    routing += ["renormalized" if normalized else "raw weights", capacity]
    if moe.pools == "modality":
        routing.append(f"{counted(moe.num_image_experts, 'expert')} for patches")
    routing += ["router reads the caption"] if moe.router_input == "caption" else []
    return [
        (
            "experts",
            f"{moe.num_experts} routed + {moe.shared_experts} shared per layer, "
            f"{moe.top_k} routed per token",
        ),
        ("routing", ", ".join(routing)),
        ("balancing", ", ".join(_balancing_terms(run)) or "none"),
    ]


def _balancing_terms(run: RunConfig) -> list[str]:
    balance, terms = run.balance, []
    for name, weight in to_mapping(balance).items():
        if not name.endswith("_weight"):
            continue
        by_modality = weight if isinstance(weight, dict) else {"": weight}
        for modality, value in by_modality.items():
            if value:
                terms.append(f"{name.removesuffix('_weight')} {modality}".rstrip() + f" {value:g}")
    if balance.uses_bias:
        scope = " per modality" if balance.bias_per_modality else ""
        terms.append(f"{balance.bias} bias{scope}, rate {balance.bias_rate:g}")
    return terms


def format_comparison(run: RunConfig, dense: RunConfig, comparison: dict[str, Any]) -> str:
    """A run and its dense baseline side by side.

    Args:
        run: The sparse run.
        dense: Its dense baseline.
        comparison: Plans of both runs, and the settings of the dense baseline.
    """
    sparse_plan, dense_plan = comparison["sparse"], comparison["dense"]
    rows = []
    for name, section, key in (
        ("parameters", "params", "total"),
        ("  active per token", "params", "active"),
        ("  trunk", "params", "trunk_total"),
        ("  trunk, active", "params", "trunk_active"),
        ("FLOPs per pair", "flops_per_pair", "training"),
        ("  forward", "flops_per_pair", "forward"),
        ("FLOPs of the run", "schedule", "total_flops"),
    ):
        sparse_value, dense_value = sparse_plan[section][key], dense_plan[section][key]
        ratio = f"{dense_value / sparse_value:.4f}"
        rows.append((name, _short(sparse_value), _short(dense_value), ratio))
    num_sparse = len(sparse_plan["layout"]["moe_blocks"])
    rows.append(("layers with experts", str(num_sparse), "0", ""))
    rows.append(("dense FFN width", str(run.model.ffn_width), str(dense.model.ffn_width), ""))

    flops = sparse_plan["flops_per_pair"]
    lines = [format_table(["", "sparse", "dense", "dense / sparse"], rows, rule=False)]
    lines.append(f"for {flops['patches']} patches and {flops['text_tokens']:g} text tokens a pair")
    lines.append(f"settings of the dense baseline: {shlex.join(comparison['dense_settings'])}")
    return "\n".join(lines)


def _relative_path(path: str) -> str:
    """The path relative to the current folder if it is below it."""
    full, current = Path(path).resolve(), Path.cwd()
    return str(full.relative_to(current)) if full.is_relative_to(current) else path


def _layout(layout: dict[str, Any]) -> str:
    """How the experts are distributed over the ranks."""
    size, world_size = layout["expert_parallel_size"], layout["world_size"]
    copies = counted(layout["expert_copies"], "copy", "copies")
    if size == 1:
        return f"every rank holds all experts ({copies})"
    groups = [f"{first}-{first + size - 1}" for first in range(0, world_size, size)]
    shown = ", ".join(groups if len(groups) <= 4 else [*groups[:2], "...", groups[-1]])
    return (
        f"{counted(layout['experts_per_rank'], 'expert')} of each layer per rank, {copies} of the "
        f"experts, on ranks {shown}"
    )


def _short(number: float) -> str:
    """Four digits and a unit: 461.5M."""
    for limit, unit in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.4g}{unit}"
    return f"{number:.4g}"
