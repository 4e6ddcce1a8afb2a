"""Cells, the reasons against them, the scaled-down run and the synthetic batch of
`pretrain.check`."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from data_pipeline.common.errors import ConfigError
from pretrain.check.batches import GlobalBatch
from pretrain.check.cells import (
    Cell,
    cell_run,
    every_cell,
    missing_rows,
    pairs_for,
    parse_cells,
    stage_of,
    why_not,
)
from pretrain.check.small import shrink, small_count
from pretrain.config.experts import MoEConfig
from pretrain.config.presets import load_run
from pretrain.config.schema import ModelConfig, ParallelConfig, RunConfig
from pretrain.config.validate import problems

TINY = load_run("tiny")


def test_all_is_the_whole_product_and_has_every_way_to_miss_pairs() -> None:
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


def test_axes_that_are_not_named_are_those_of_the_run() -> None:
    run = replace(TINY, parallel=ParallelConfig(expert_parallel_size=4, deepspeed="zero2_offload"))
    assert parse_cells(["zero=0,own; accum=2"], run, 4) == [
        Cell(expert_parallel_size=4, zero="0", accumulation=2),
        Cell(expert_parallel_size=4, zero="2_offload", accumulation=2),
    ]
    assert {(cell.accumulation, cell.zero) for cell in parse_cells(["own"], run, 4)} == {
        (1, "2_offload"),
        (4, "2_offload"),
    }


def test_texts_add_up_and_no_cell_comes_twice() -> None:
    cells = parse_cells(["ep=1 zero=1,2", "ep=1,2 zero=1"], TINY, 2)
    assert [(cell.expert_parallel_size, cell.zero) for cell in cells] == [
        (1, "1"),
        (1, "2"),
        (2, "1"),
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("zeros=1", "no axis 'zeros'; possible: ep, zero"),
        ("ep=0", "ep=0: expected a whole number above 0"),
        ("precision=fp16", "possible: fp32, bf16"),
        ("", "expected all, own, or axes"),
        ("ep", "expected all, own"),
        ("recompute=yes", "possible: off, on"),
    ],
)
def test_a_wrong_word_is_told_with_the_right_ones(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_cells([text], TINY, 2)


def test_a_profile_of_the_run_takes_the_place_of_its_stage(tmp_path: Path) -> None:
    profile = tmp_path / "mine.json"
    profile.write_text('{"zero_optimization": {"stage": 2}}', encoding="utf-8")
    run = replace(TINY, parallel=ParallelConfig(deepspeed=str(profile)))
    assert {cell.zero for cell in every_cell(run, 1)} == {"0", "1", str(profile), "3"}
    mine = Cell(zero=str(profile))
    assert stage_of(mine) == 2 and not why_not(run, mine, 1, 8)
    assert cell_run(run, mine, 1, 8).parallel.deepspeed == str(profile)


@pytest.mark.parametrize(
    ("cell", "pairs", "said"),
    [
        (Cell(expert_parallel_size=3), 12, "does not divide moe.num_experts"),
        (Cell(expert_parallel_size=8), 8, "does not divide the 4 ranks started"),
        (
            Cell(accumulation=4),
            24,
            "24 pairs do not split into 4 ranks x 4 micro-batches; use a multiple of 16",
        ),
        (Cell(zero="7"), 8, "no such JSON file, and no profile"),
    ],
)
def test_cells_that_cannot_run_have_a_reason(cell: Cell, pairs: int, said: str) -> None:
    assert said in why_not(TINY, cell, 4, pairs)


def test_the_only_rank_can_have_an_empty_micro_batch_but_not_an_empty_step() -> None:
    assert "only rank" in why_not(TINY, Cell(missing="rank"), 1, 8)
    assert not [
        why
        for cell in every_cell(TINY, 2)
        if (why := why_not(TINY, cell, 2, pairs_for([cell], TINY, 2)))
    ]
    assert not why_not(TINY, Cell(missing="rank", accumulation=4), 1, 8)


def test_a_cut_capacity_group_is_a_reason_and_the_usual_batch_cuts_none() -> None:
    run = replace(TINY, moe=MoEConfig(capacity_factor=1.0, capacity_group_size=4))
    cells = [Cell(accumulation=1), Cell(accumulation=4), Cell(accumulation=3)]
    assert "capacity_group_size" in why_not(run, cells[1], 2, 16)
    pairs = pairs_for(cells, run, 2)
    assert pairs == 2 * 4 * 12
    assert not any(why_not(run, cell, 2, pairs) for cell in cells)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_missing_rows_are_all_those_of_the_last_rank(accumulation: int) -> None:
    cell, world_size, pairs = Cell(missing="rank", accumulation=accumulation), 4, 16
    per_forward = pairs // (world_size * accumulation)
    by_rank = Counter(
        row // per_forward % world_size for row in missing_rows(cell, world_size, pairs)
    )
    assert by_rank == {world_size - 1: pairs // world_size}


def test_a_few_missing_rows_leave_ranks_with_unequal_numbers_and_the_twins() -> None:
    for pairs in (8, 12, 16, 32, 64, 96):
        rows = missing_rows(Cell(), 2, pairs)
        assert 0 < len(rows) <= pairs / 4
        hashes = GlobalBatch(TINY.model, 0, 0, pairs, rows).rows(0, pairs).caption_hashes.tolist()
        assert max(Counter(hashes).values()) >= 2  # equal captions are there whatever is missing


@pytest.mark.parametrize("preset", ["quickstart", "tiny", "s16", "b16", "l16", "h14"])
@pytest.mark.parametrize("balancing", ["switch", "vmoe", "limoe", "vl_moe", "deepseek", "ours"])
def test_every_preset_shrinks_to_a_run_that_can_be_checked(
    preset: str, balancing: str, tmp_path: Path
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"extends: [{preset}, {balancing}]\n", encoding="utf-8")
    run = load_run(path)
    small = shrink(run)
    pairs = pairs_for([Cell(accumulation=4)], small, 4)
    assert not why_not(
        small, Cell(expert_parallel_size=4, zero="1", accumulation=4, precision="bf16"), 4, pairs
    )
    assert small.model.width <= 32 and small.moe.num_experts <= 8 and small.model.num_layers <= 4
    assert small.optim == run.optim and small.loss == run.loss
    for name in (
        "routing",
        "score_func",
        "router_input",
        "pools",
        "capacity_factor",
        "capacity_priority",
        "norm_topk_prob",
        "backend",
        "shared_experts",
        "temperature",
        "noise_std",
    ):
        assert getattr(small.moe, name) == getattr(run.moe, name)
    for name in (
        "balance_weight",
        "router_z_weight",
        "importance_weight",
        "load_weight",
        "local_entropy_weight",
        "global_entropy_weight",
        "expert_l1_weight",
        "router_l1_weight",
        "bias",
        "bias_per_modality",
    ):
        assert getattr(small.balance, name) == getattr(run.balance, name)


@pytest.mark.parametrize("experts", [1, 2, 6, 8, 9, 12, 15, 16, 24, 30, 32, 60, 64, 100, 256])
def test_fewer_experts_can_be_split_as_the_many_can(experts: int) -> None:
    few = small_count(experts)
    assert few <= 8 and few <= experts
    for ranks in (2, 4, 8):
        assert (few % ranks == 0) == (experts % ranks == 0)


@pytest.mark.parametrize(
    "moe",
    [
        MoEConfig(num_experts=16, pools="modality", image_experts=12, top_k=2),
        MoEConfig(num_experts=16, router_input="caption", start=20, every=3),
        MoEConfig(num_experts=12, start=3, every=6, stop=9),
        MoEConfig(num_experts=64, top_k=9, routing="expert_choice"),
        MoEConfig(num_experts=4, start=40),
    ],
)
def test_placement_pools_and_gate_survive(moe: MoEConfig) -> None:
    run = RunConfig(model=ModelConfig(num_layers=24, fusion_layer=12), moe=moe)
    small = shrink(run)
    assert not problems(cell_run(small, Cell(), 1, 8), 1)
    assert bool(small.moe.blocks(small.model.num_layers)) == bool(moe.blocks(24))
    assert (small.moe.image_experts > 0) == (moe.image_experts > 0)


def test_a_row_is_the_same_in_every_split_of_the_batch() -> None:
    model = replace(TINY.model, image_size=16, context_length=12, vocab_size=50)
    batch = GlobalBatch(model, 3, 1, 8, (1, 6))
    whole, parts = batch.rows(0, 8), [batch.rows(first, 2) for first in (0, 2, 4, 6)]
    assert torch.equal(whole.images, torch.cat([part.images for part in parts]))
    for name in ("caption_hashes", "ids", "text_lengths"):
        assert torch.equal(getattr(whole, name), torch.cat([getattr(part, name) for part in parts]))
    assert [part.slots.tolist() for part in parts] == [[0], [0, 1], [0, 1], [1]]
    tokens = [
        row[:length].tolist()
        for row, length in zip(whole.text_ids, whole.text_lengths, strict=True)
    ]
    assert len(set(whole.text_lengths.tolist())) > 1
    assert all(
        caption[0] == 1 and caption[-1] == 2 and min(caption[1:-1]) > 3 for caption in tokens
    )
    equal = whole.caption_hashes[:, None] == whole.caption_hashes
    same = torch.tensor([[a == b for b in tokens] for a in tokens])
    assert torch.equal(equal, same) and int(equal.sum()) > len(tokens)


def test_steps_differ_and_a_batch_can_be_empty() -> None:
    model = replace(TINY.model, image_size=16)
    first, second = (GlobalBatch(model, 0, step, 4).rows(0, 4) for step in (0, 1))
    assert not torch.equal(first.images, second.images)
    assert not set(first.ids.tolist()) & set(second.ids.tolist())
    none = GlobalBatch(model, 0, 0, 4, range(4)).rows(0, 4)
    assert len(none.images) == len(none.text_positions) == len(none.slots) == 0
