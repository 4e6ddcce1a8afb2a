"""Validation of runs: every problem is reported, all of them in one error."""

from __future__ import annotations

import re

import pytest

from pretrain.config.presets import load_run
from pretrain.config.validate import problems
from tests.unit.pretrain.validate_support import assert_one_problem, find_problems


def test_valid_run() -> None:
    assert problems(load_run("tiny"), 2) == []


@pytest.mark.parametrize(
    ("overrides", "world_size", "parts"),
    [
        (
            ["batch.global_batch_size=100"],
            2,
            [
                "batch.global_batch_size is 100",
                "batch.micro_batch_size (64) x 2 ranks = 128",
                "batch.global_batch_size=128",
                "batch.micro_batch_size=50",
            ],
        ),
        (
            ["batch={global_batch_size: 1, micro_batch_size: 1}"],
            1,
            ["batch.global_batch_size is 1", "loss.contrastive_weight=0"],
        ),
        (
            ["parallel.expert_parallel_size=16"],
            16,
            [
                "parallel.expert_parallel_size is 16",
                "8 experts (moe.num_experts)",
                "at most 8 with 16 ranks",
            ],
        ),
        (
            ["parallel.expert_parallel_size=3"],
            3,
            ["parallel.expert_parallel_size is 3", "moe.num_experts (8)", "1, 2, 4, 8"],
        ),
        (
            ["parallel.expert_parallel_size=4"],
            2,
            ["parallel.expert_parallel_size is 4", "ranks (2)", "multiple of 4", "or use 2"],
        ),
        (
            ["parallel.expert_parallel_size=0"],
            1,
            ["parallel.expert_parallel_size is 0", "at least 1"],
        ),
        (
            ["parallel.expert_parallel_size=2", "moe.start=4"],
            2,
            ["parallel.expert_parallel_size is 2", "no block has experts", "moe.start 4"],
        ),
        (
            ["parallel.engine=plain"],
            2,
            ["parallel.engine is plain", "2 ranks", "parallel.engine=deepspeed"],
        ),
        (
            ["precision.compute=bf16", "moe.expert_width=60"],
            1,
            ["moe.expert_width is 60", "multiple of 8", "moe.backend=loop"],
        ),
        (
            ["moe.expert_width=62"],
            1,
            [
                "moe.expert_width is 62",
                "precision.compute=fp32",
                "multiple of 4",
                "moe.backend=loop",
            ],
        ),
        (["moe={expert_width: 62, backend: grouped}"], 1, ["multiple of 4", "moe.backend=loop"]),
    ],
)
def test_layout(overrides: list[str], world_size: int, parts: list[str]) -> None:
    assert_one_problem(overrides, world_size, parts)


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["moe.stop=-2"], ["moe.stop is -2", "moe.stop=-1"]),
        (
            ["moe.capacity_factor=1", "moe.capacity_group_size=7"],
            ["moe.capacity_group_size is 7", "batch.micro_batch_size (64)", "1, 2, 4, 8, 16"],
        ),
        (
            ["moe.router_input=caption", "moe.stop=2"],
            ["moe.router_input is caption", "model.fusion_layer", "moe.router_input=token"],
        ),
        (["balance.balance_weight=-1"], ["balance.balance_weight is -1.0", "at least 0"]),
        (
            ["balance.local_entropy_weight.text=-2"],
            ["balance.local_entropy_weight.text is -2.0", "at least 0"],
        ),
        (
            ["balance.load_weight=1"],
            ["balance.load_weight is 1", "moe.routing=noisy_top_k", "balance.load_weight=0"],
        ),
        (
            ["balance={load_weight: 0.1, bias: sign}", "moe.routing=noisy_top_k"],
            [
                "balance.load_weight is 0.1",
                "balance.bias (sign)",
                "balance.bias=none",
                "balance.load_weight=0",
            ],
        ),
        (
            ["balance.bias_per_modality=true"],
            [
                "balance.bias_per_modality is true",
                "balance.bias is none",
                "balance.bias=sign or zscore",
                "balance.bias_per_modality=false",
            ],
        ),
        (
            ["balance.global_entropy_experts.text=0.5"],
            ["balance.global_entropy_experts.text is 0.5", "at least 1"],
        ),
        (
            ["balance.global_entropy_experts.image=9"],
            ["balance.global_entropy_experts.image is 9", "more than the 8 experts"],
        ),
        (
            ["balance.global_entropy_experts.text=5", "moe.pools=modality"],
            ["balance.global_entropy_experts.text is 5", "more than the 4 experts"],
        ),
        (["balance.bias_rate=0"], ["balance.bias_rate is 0.0", "balance.bias=none"]),
        (["balance.bias_freeze_ratio=2"], ["balance.bias_freeze_ratio is 2.0", "in 0..1"]),
    ],
)
def test_experts_and_balance(overrides: list[str], parts: list[str]) -> None:
    assert_one_problem(overrides, 1, parts)


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["optim.lr=0"], ["optim.lr is 0.0", "above 0"]),
        (["optim.betas=[0.9, 1]"], ["optim.betas is [0.9, 1.0]", "in 0..1"]),
        (["data.prefetch=0"], ["data.prefetch is 0", "at least 1"]),
        (
            ["loss.caption_weight=0", "loss.contrastive_weight=0"],
            ["loss.contrastive_weight", "loss.caption_weight", "both 0"],
        ),
        (
            ["loss.logit_scale_init=200"],
            ["loss.logit_scale_init is 200.0", "below loss.logit_scale_max (100.0)"],
        ),
        (
            ["schedule={kind: wsd, warmup_steps: 900, decay_ratio: 0.2}"],
            [
                "schedule.warmup_steps is 900",
                "schedule.decay_ratio",
                "200",
                "schedule.total_steps (1000)",
            ],
        ),
    ],
)
def test_ranges(overrides: list[str], parts: list[str]) -> None:
    assert_one_problem(overrides, 1, parts)


@pytest.mark.parametrize("kind", ["cosine", "wsd"])
@pytest.mark.parametrize(("steps", "decay_ratio"), [(20, 0.2), (1, 0.2), (104, 0.2), (99, 0.95)])
def test_a_run_shorter_than_its_warmup(kind: str, steps: int, decay_ratio: float) -> None:
    """The message has both settings with their values, and a warm-up that makes the run valid."""
    settings = [f"schedule={{kind: {kind}, total_steps: {steps}, decay_ratio: {decay_ratio}}}"]
    if kind == "cosine" and steps >= 100:
        assert find_problems(settings, 1) == []
        return
    (problem,) = find_problems(settings, 1)
    assert "schedule.warmup_steps is 100" in problem
    assert f"schedule.total_steps ({steps})" in problem
    fitting = re.search(r"set (schedule\.warmup_steps=\d+)", problem)
    assert fitting is not None and find_problems([*settings, fitting[1]], 1) == []


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["data.caption_keys=['json:']"], ["data.caption_keys", "'json:'", "json:FIELD"]),
        (["data.caption_weights=[0]"], ["data.caption_weights is [0.0]", "at least 0"]),
        (
            ["data.augment.crop_scale=[0.9, 0.5]"],
            ["data.augment.crop_scale is [0.9, 0.5]", "ascending"],
        ),
        (
            ["data.augment.crop_scale=[0.9, 1.5]"],
            ["data.augment.crop_scale is [0.9, 1.5]", "at most 1"],
        ),
        (["data.train=[t, u, t/]"], ["data.train", " t ", "2 times"]),
        (
            ["eval.sets=[{name: a, shards: x}, {name: a, shards: y}]"],
            ["eval.sets", "2 sets", "'a'"],
        ),
        (["eval.sets=[{name: a/b, shards: x}]"], ["eval.sets", "'a/b'", "letters, digits"]),
        (["eval.sets=[{name: a, shards: ''}]"], ["eval.sets 'a'", "no shards"]),
        (
            ["eval.sets=[{name: a, shards: t}]", "data.train=[t]"],
            ["eval.sets 'a' is t", "data.train"],
        ),
        (
            ["eval.sets=[{name: a, shards: ./t/}]", "data.train=[t/manifest.json]"],
            ["eval.sets 'a' is ./t/", "data.train"],
        ),
        (
            ["eval.sets=[{name: a, shards: 's3://b/t/'}]", "data.train=['s3://b/t']"],
            ["eval.sets 'a' is s3://b/t/", "data.train"],
        ),
    ],
)
def test_data(overrides: list[str], parts: list[str]) -> None:
    assert_one_problem(overrides, 1, parts)
