"""Inputs of `pretrain.parity`: the scaled-down run and the synthetic batch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pretrain.config.experts import MoEConfig
from pretrain.config.presets import load_run
from pretrain.config.schema import ModelConfig, RunConfig
from pretrain.config.validate import problems
from pretrain.parity.batches import GlobalBatch
from pretrain.parity.case_runs import min_global_batch_size, run_for_case, unsupported_reason
from pretrain.parity.cases import Case
from pretrain.parity.scale_down import shrink, small_num_experts

TINY = load_run("tiny")


@pytest.mark.parametrize("preset", ["first", "quickstart", "tiny", "s16", "b16", "l16", "h14"])
@pytest.mark.parametrize("balancing", ["switch", "vmoe", "limoe", "vl_moe", "deepseek", "ours"])
def test_every_preset_shrinks_to_a_supported_run(
    preset: str, balancing: str, tmp_path: Path
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"extends: [{preset}, {balancing}]\n", encoding="utf-8")
    run = load_run(path)
    small = shrink(run)
    pairs = min_global_batch_size([Case(accumulation=4)], small, 4)
    case = Case(expert_parallel_size=4, zero="1", accumulation=4, precision="bf16")
    assert not unsupported_reason(small, case, 4, pairs)
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
def test_small_num_experts_keeps_divisibility(experts: int) -> None:
    small = small_num_experts(experts)
    assert small <= 8 and small <= experts
    for ranks in (2, 4, 8):
        assert (small % ranks == 0) == (experts % ranks == 0)


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
def test_shrink_keeps_sparse_layers_and_pools(moe: MoEConfig) -> None:
    run = RunConfig(model=ModelConfig(num_layers=24, fusion_layer=12), moe=moe)
    small = shrink(run)
    assert not problems(run_for_case(small, Case(), 1, 8), 1)
    assert bool(small.moe.blocks(small.model.num_layers)) == bool(moe.blocks(24))
    assert (small.moe.image_experts > 0) == (moe.image_experts > 0)


def test_rows_do_not_depend_on_the_split() -> None:
    model = replace(TINY.model, image_size=16, context_length=12, vocab_size=50)
    batch = GlobalBatch(model, 3, 1, 8, (1, 6))
    full, parts = batch.rows(0, 8), [batch.rows(first, 2) for first in (0, 2, 4, 6)]
    assert torch.equal(full.images, torch.cat([part.images for part in parts]))
    for name in ("caption_hashes", "ids", "text_lengths"):
        assert torch.equal(getattr(full, name), torch.cat([getattr(part, name) for part in parts]))
    assert [part.slots.tolist() for part in parts] == [[0], [0, 1], [0, 1], [1]]


def test_captions_have_different_lengths_and_some_are_equal() -> None:
    model = replace(TINY.model, image_size=16, context_length=12, vocab_size=50)
    batch = GlobalBatch(model, 3, 1, 8, (1, 6)).rows(0, 8)
    captions = [
        row[:length].tolist()
        for row, length in zip(batch.text_ids, batch.text_lengths, strict=True)
    ]
    assert len(set(batch.text_lengths.tolist())) > 1
    for caption in captions:
        assert caption[0] == 1 and caption[-1] == 2 and min(caption[1:-1]) > 3

    equal_hashes = batch.caption_hashes[:, None] == batch.caption_hashes
    equal_captions = torch.tensor([[a == b for b in captions] for a in captions])
    assert torch.equal(equal_hashes, equal_captions)
    assert int(equal_hashes.sum()) > len(captions)


def test_steps_differ() -> None:
    model = replace(TINY.model, image_size=16)
    first, second = (GlobalBatch(model, 0, step, 4).rows(0, 4) for step in (0, 1))
    assert not torch.equal(first.images, second.images)
    assert not set(first.ids.tolist()) & set(second.ids.tolist())


def test_a_batch_can_be_empty() -> None:
    model = replace(TINY.model, image_size=16)
    batch = GlobalBatch(model, 0, 0, 4, range(4)).rows(0, 4)
    assert len(batch.images) == len(batch.text_positions) == len(batch.slots) == 0
