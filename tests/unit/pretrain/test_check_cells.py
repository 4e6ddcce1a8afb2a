"""Cells of `pretrain.check` (combinations of layout, precision and missing pairs): selection,
unsupported cells, missing rows."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from data_pipeline.common.errors import ConfigError
from pretrain.check.batches import GlobalBatch
from pretrain.check.cell_runs import (
    min_global_batch_size,
    missing_rows,
    run_for_cell,
    unsupported_reason,
)
from pretrain.check.cell_selection import all_cells, parse_cells
from pretrain.check.cells import Cell, stage_of
from pretrain.config.experts import MoEConfig
from pretrain.config.presets import load_run
from pretrain.config.schema import ParallelConfig

TINY = load_run("tiny")


def test_all_selects_every_value_of_every_axis() -> None:
    cells = parse_cells(["all"], TINY, 2)
    assert len(cells) == len(set(cells)) == 2 * 4 * 2 * 2 * 2 + 2 * 4 * 2 + 2 * 4
    for field, values in {
        "expert_parallel_size": {1, 2},
        "zero": {"0", "1", "2", "3"},
        "accumulation": {1, 4},
        "recompute": {False, True},
        "precision": {"fp32", "bf16"},
        "missing": {"none", "pairs", "rank"},
    }.items():
        assert {getattr(cell, field) for cell in cells} == values


def test_axes_that_are_not_named_have_the_values_of_the_run() -> None:
    run = replace(TINY, parallel=ParallelConfig(expert_parallel_size=4, deepspeed="zero2_offload"))
    assert parse_cells(["zero=0,own; accum=2"], run, 4) == [
        Cell(expert_parallel_size=4, zero="0", accumulation=2),
        Cell(expert_parallel_size=4, zero="2_offload", accumulation=2),
    ]
    assert {(cell.accumulation, cell.zero) for cell in parse_cells(["own"], run, 4)} == {
        (1, "2_offload"),
        (4, "2_offload"),
    }


def test_selections_are_merged_without_duplicates() -> None:
    cells = parse_cells(["ep=1 zero=1,2", "ep=1,2 zero=1"], TINY, 2)
    assert [(cell.expert_parallel_size, cell.zero) for cell in cells] == [
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
        parse_cells([selection], TINY, 2)
    assert all(part in str(raised.value) for part in ["--cells", *parts])


def test_a_profile_of_the_run_replaces_the_default_of_its_stage(tmp_path: Path) -> None:
    profile = tmp_path / "mine.json"
    profile.write_text('{"zero_optimization": {"stage": 2}}', encoding="utf-8")
    run = replace(TINY, parallel=ParallelConfig(deepspeed=str(profile)))
    assert {cell.zero for cell in all_cells(run, 1)} == {"0", "1", str(profile), "3"}

    cell = Cell(zero=str(profile))
    assert stage_of(cell) == 2 and not unsupported_reason(run, cell, 1, 8)
    assert run_for_cell(run, cell, 1, 8).parallel.deepspeed == str(profile)


@pytest.mark.parametrize(
    ("cell", "pairs", "parts"),
    [
        (Cell(expert_parallel_size=3), 12, ["expert_parallel_size is 3", "moe.num_experts"]),
        (Cell(expert_parallel_size=8), 8, ["expert_parallel_size is 8", "number of ranks (4)"]),
        (Cell(accumulation=4), 24, ["24 pairs", "4 ranks x 4 micro-batches", "multiple of 16"]),
        (Cell(zero="7"), 8, ["zero7"]),
    ],
)
def test_unsupported_cells_have_a_reason(cell: Cell, pairs: int, parts: list[str]) -> None:
    reason = unsupported_reason(TINY, cell, 4, pairs)
    assert all(part in reason for part in parts), reason


def test_a_single_rank_can_have_an_empty_micro_batch_but_not_an_empty_step() -> None:
    assert "only rank" in unsupported_reason(TINY, Cell(missing="rank"), 1, 8)
    assert not unsupported_reason(TINY, Cell(missing="rank", accumulation=4), 1, 8)
    for cell in all_cells(TINY, 2):
        assert not unsupported_reason(TINY, cell, 2, min_global_batch_size([cell], TINY, 2))


def test_the_smallest_batch_splits_no_capacity_group() -> None:
    run = replace(TINY, moe=MoEConfig(capacity_factor=1.0, capacity_group_size=4))
    cells = [Cell(accumulation=1), Cell(accumulation=4), Cell(accumulation=3)]
    assert "capacity_group_size" in unsupported_reason(run, cells[1], 2, 16)
    pairs = min_global_batch_size(cells, run, 2)
    assert pairs == 2 * 4 * 12
    assert not any(unsupported_reason(run, cell, 2, pairs) for cell in cells)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_missing_rank_removes_all_rows_of_the_last_rank(accumulation: int) -> None:
    cell, world_size, pairs = Cell(missing="rank", accumulation=accumulation), 4, 16
    micro_batch_size = pairs // (world_size * accumulation)
    rows_by_rank = Counter(
        row // micro_batch_size % world_size for row in missing_rows(cell, world_size, pairs)
    )
    assert rows_by_rank == {world_size - 1: pairs // world_size}


@pytest.mark.parametrize("pairs", [8, 12, 16, 32, 64, 96])
def test_missing_pairs_keep_equal_captions(pairs: int) -> None:
    rows = missing_rows(Cell(), 2, pairs)
    assert 0 < len(rows) <= pairs / 4
    hashes = GlobalBatch(TINY.model, 0, 0, pairs, rows).rows(0, pairs).caption_hashes.tolist()
    assert max(Counter(hashes).values()) >= 2
