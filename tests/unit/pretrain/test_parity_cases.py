"""Cases of `pretrain.parity` (combinations of layout, precision and missing pairs): selection,
unsupported cases, missing rows."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from data_pipeline.common.errors import ConfigError
from pretrain.config.experts import MoEConfig
from pretrain.config.presets import load_run, preset_names
from pretrain.config.schema import ParallelConfig
from pretrain.parity.batches import GlobalBatch
from pretrain.parity.case_runs import (
    min_global_batch_size,
    missing_rows,
    run_for_case,
    unsupported_reason,
)
from pretrain.parity.cases import Case, stage_of
from pretrain.parity.scale_down import shrink
from pretrain.parity.selection import all_cases, parse_cases

TINY = load_run("tiny")


def test_all_selects_every_value_of_every_axis() -> None:
    cases = parse_cases(["all"], TINY, 2)
    assert len(cases) == len(set(cases)) == 2 * 4 * 2 * 2 * 2 + 2 * 4 * 2 + 2 * 4
    for field, values in {
        "expert_parallel_size": {1, 2},
        "zero": {"0", "1", "2", "3"},
        "accumulation": {1, 4},
        "recompute": {False, True},
        "precision": {"fp32", "bf16"},
        "missing": {"none", "pairs", "rank"},
    }.items():
        assert {getattr(case, field) for case in cases} == values


def test_axes_that_are_not_named_have_the_values_of_the_run() -> None:
    run = replace(TINY, parallel=ParallelConfig(expert_parallel_size=4, deepspeed="zero2_offload"))
    assert parse_cases(["zero=0,own; accum=2"], run, 4) == [
        Case(expert_parallel_size=4, zero="0", accumulation=2),
        Case(expert_parallel_size=4, zero="2_offload", accumulation=2),
    ]
    assert {(case.accumulation, case.zero) for case in parse_cases(["own"], run, 4)} == {
        (1, "2_offload"),
        (4, "2_offload"),
    }


def test_selections_are_merged_without_duplicates() -> None:
    cases = parse_cases(["ep=1 zero=1,2", "ep=1,2 zero=1"], TINY, 2)
    assert [(case.expert_parallel_size, case.zero) for case in cases] == [
        (1, "1"),
        (1, "2"),
        (2, "1"),
    ]


@pytest.mark.parametrize(
    ("selection", "parts"),
    [
        ("zeros=1", ["'zeros'", "ep, zero"]),
        ("ep=0", ["ep=0"]),
        ("precision=fp16", ["fp16", "fp32, bf16"]),
        ("", ["all, own"]),
        ("ep", ["all, own"]),
        ("recompute=yes", ["yes", "off, on"]),
    ],
)
def test_an_invalid_selection_is_an_error(selection: str, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as raised:
        parse_cases([selection], TINY, 2)
    assert all(part in str(raised.value) for part in ["--cases", *parts])


def test_a_profile_of_the_run_replaces_the_default_of_its_stage(tmp_path: Path) -> None:
    profile = tmp_path / "mine.json"
    profile.write_text('{"zero_optimization": {"stage": 2}}', encoding="utf-8")
    run = replace(TINY, parallel=ParallelConfig(deepspeed=str(profile)))
    assert {case.zero for case in all_cases(run, 1)} == {"0", "1", str(profile), "3"}

    case = Case(zero=str(profile))
    assert stage_of(case) == 2 and not unsupported_reason(run, case, 1, 8)
    assert run_for_case(run, case, 1, 8).parallel.deepspeed == str(profile)


@pytest.mark.parametrize(
    ("case", "pairs", "parts"),
    [
        (Case(expert_parallel_size=3), 12, ["expert_parallel_size is 3", "moe.num_experts"]),
        (Case(expert_parallel_size=8), 8, ["expert_parallel_size is 8", "number of ranks (4)"]),
        (Case(accumulation=4), 24, ["24 pairs", "4 ranks x 4 micro-batches", "multiple of 16"]),
        (Case(zero="7"), 8, ["zero7"]),
    ],
)
def test_unsupported_cases_have_a_reason(case: Case, pairs: int, parts: list[str]) -> None:
    reason = unsupported_reason(TINY, case, 4, pairs)
    assert all(part in reason for part in parts), reason


def test_a_single_rank_can_have_an_empty_micro_batch_but_not_an_empty_step() -> None:
    assert "only rank" in unsupported_reason(TINY, Case(missing="rank"), 1, 8)
    assert not unsupported_reason(TINY, Case(missing="rank", accumulation=4), 1, 8)
    for case in all_cases(TINY, 2):
        assert not unsupported_reason(TINY, case, 2, min_global_batch_size([case], TINY, 2))


def test_the_smallest_batch_splits_no_capacity_group() -> None:
    run = replace(TINY, moe=MoEConfig(capacity_factor=1.0, capacity_group_size=4))
    cases = [Case(accumulation=1), Case(accumulation=4), Case(accumulation=3)]
    assert "capacity_group_size" in unsupported_reason(run, cases[1], 2, 16)
    pairs = min_global_batch_size(cases, run, 2)
    assert pairs == 2 * 4 * 12
    assert not any(unsupported_reason(run, case, 2, pairs) for case in cases)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_missing_rank_removes_all_rows_of_the_last_rank(accumulation: int) -> None:
    case, world_size, pairs = Case(missing="rank", accumulation=accumulation), 4, 16
    micro_batch_size = pairs // (world_size * accumulation)
    rows_by_rank = Counter(
        row // micro_batch_size % world_size for row in missing_rows(case, world_size, pairs)
    )
    assert rows_by_rank == {world_size - 1: pairs // world_size}


@pytest.mark.parametrize("pairs", [8, 12, 16, 32, 64, 96])
def test_missing_pairs_keep_equal_captions(pairs: int) -> None:
    rows = missing_rows(Case(), 2, pairs)
    assert 0 < len(rows) <= pairs / 4
    hashes = GlobalBatch(TINY.model, 0, 0, pairs, rows).rows(0, pairs).caption_hashes.tolist()
    assert max(Counter(hashes).values()) >= 2


@pytest.mark.parametrize("preset", sorted(preset_names()))
def test_cases_of_every_preset_run_or_have_a_reason(preset: str) -> None:
    run = shrink(load_run(preset, []))
    cases = parse_cases(["own", "terms=all,aux"], run, 2)
    reasons = {
        case: unsupported_reason(run, case, 2, min_global_batch_size(cases, run, 2))
        for case in cases
    }
    has_losses = run.balance.uses_losses and bool(run.moe.blocks(run.model.num_layers))
    for case, reason in reasons.items():
        assert ("no auxiliary losses" in reason) == (case.terms == "aux" and not has_losses), reason


def test_a_run_without_auxiliary_losses() -> None:
    assert not load_run("quickstart", []).balance.uses_losses
    assert load_run("tiny", []).balance.uses_losses
    for setting in ("router_l1_weight=0.1", "local_entropy_weight={text: 0.1}"):
        assert load_run("quickstart", [f"balance.{setting}"]).balance.uses_losses
