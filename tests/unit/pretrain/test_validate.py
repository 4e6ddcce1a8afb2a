"""Contradictions in a run: every one is told, all at once, with what to do."""

from __future__ import annotations

import contextlib

import pytest
import torch

from data_pipeline.common.errors import ConfigError
from pretrain.config.presets import load_run
from pretrain.config.validate import check, problems, training_problems
from pretrain.moe.experts import grouped_swiglu


def test_a_good_run_has_no_problem() -> None:
    assert problems(load_run("tiny"), 2) == []


@pytest.mark.parametrize(
    ("overrides", "world_size", "part"),
    [
        (
            ["batch.global_batch_size=100"],
            2,
            "batch.global_batch_size is 100, not a positive multiple of "
            "batch.micro_batch_size (64) x 2 ranks = 128; the nearest that is: batch.global_batch_size=128, "
            "or batch.micro_batch_size=50",
        ),
        (
            ["parallel.expert_parallel_size=16"],
            16,
            "more ranks than the 8 experts (moe.num_experts) can be split over; "
            "use at most 8 with 16 ranks",
        ),
        (
            ["parallel.expert_parallel_size=3"],
            3,
            "does not divide moe.num_experts (8); possible: 1, 2, 4, 8",
        ),
        (
            ["parallel.expert_parallel_size=4"],
            2,
            "does not divide the 2 ranks started; start a multiple of 4, or use 2",
        ),
        (["parallel.expert_parallel_size=0"], 1, "must be at least 1"),
        (["parallel.expert_parallel_size=2", "moe.start=4"], 2, "no block has experts"),
        (["parallel.engine=plain"], 2, "one process, but 2 ranks were started"),
        (["optim.lr=0"], 1, "optim.lr is 0.0, but must be above 0"),
        (["optim.betas=[0.9, 1]"], 1, "optim.betas is [0.9, 1.0], but must be in 0..1"),
        (["loss.caption_weight=0", "loss.contrastive_weight=0"], 1, "nothing would be learned"),
        (["loss.logit_scale_init=200"], 1, "below loss.logit_scale_max (100.0)"),
        (["balance.balance_weight=-1"], 1, "balance.balance_weight is -1.0, below 0"),
        (
            ["balance.local_entropy_weight.text=-2"],
            1,
            "balance.local_entropy_weight.text is -2.0, below 0",
        ),
        (["balance.load_weight=1"], 1, "set moe.routing=noisy_top_k, or balance.load_weight=0"),
        (
            ["balance={load_weight: 0.1, bias: sign}", "moe.routing=noisy_top_k"],
            1,
            "knows nothing of balance.bias (sign), which "
            "decides the choice with the scores; set balance.bias=none, or balance.load_weight=0",
        ),
        (
            ["balance.bias_per_modality=true"],
            1,
            "balance.bias is none, so that there is no bias; set balance.bias=sign or "
            "zscore, or balance.bias_per_modality=false",
        ),
        (
            ["balance.global_entropy_experts.text=0.5"],
            1,
            "balance.global_entropy_experts.text is 0.5, and fewer than 1",
        ),
        (["moe.stop=-2"], 1, "moe.stop is -2, but blocks are not counted from the end"),
        (["balance.global_entropy_experts.image=9"], 1, "more than the 8 experts that serve it"),
        (
            ["balance.global_entropy_experts.text=5", "moe.pools=modality"],
            1,
            "more than the 4 experts",
        ),
        (["balance.bias_rate=0"], 1, "balance.bias=none turns biases off"),
        (["balance.bias_freeze_ratio=2"], 1, "must be in 0..1"),
        (
            ["moe.capacity_factor=1", "moe.capacity_group_size=7"],
            1,
            "does not divide batch.micro_batch_size (64)",
        ),
        (["moe.router_input=caption", "moe.stop=2"], 1, "set moe.router_input=token"),
        (["batch={global_batch_size: 1, micro_batch_size: 1}"], 1, "contrast needs other pairs"),
        (
            ["schedule={kind: wsd, warmup_steps: 900, decay_ratio: 0.2}"],
            1,
            "longer than schedule.total_steps (1000)",
        ),
        (["data.caption_keys=['json:']"], 1, "or json:FIELD"),
        (["data.caption_weights=[0]"], 1, "at least 0 and not all 0"),
        (["data.augment.crop_scale=[0.9, 0.5]"], 1, "the smaller first"),
        (["data.augment.crop_scale=[0.9, 1.5]"], 1, "a crop keeps at most 1"),
        (["eval.sets=[{name: a, shards: x}, {name: a, shards: y}]"], 1, "2 sets called 'a'"),
        (["eval.sets=[{name: a/b, shards: x}]"], 1, "use letters, digits"),
        (["eval.sets=[{name: a, shards: ''}]"], 1, "has no shards"),
        (["eval.sets=[{name: a, shards: t}]", "data.train=[t]"], 1, "is not held out"),
        (
            ["eval.sets=[{name: a, shards: ./t/}]", "data.train=[t/manifest.json]"],
            1,
            "is not held out",
        ),
        (
            ["eval.sets=[{name: a, shards: 's3://b/t/'}]", "data.train=['s3://b/t']"],
            1,
            "is not held out",
        ),
        (["data.train=[t, u, t/]"], 1, "data.train names t 2 times"),
        (
            ["precision.compute=bf16", "moe.expert_width=60"],
            1,
            "multiple of 8, or set moe.backend=loop",
        ),
        (
            ["moe.expert_width=62"],
            1,
            "with precision.compute=fp32 it must be a multiple of 4, or set moe.backend=loop",
        ),
        (
            ["moe={expert_width: 62, backend: grouped}"],
            1,
            "must be a multiple of 4, or set moe.backend=loop",
        ),
        (["data.prefetch=0"], 1, "data.prefetch is 0, but must be at least 1"),
    ],
)
def test_each_contradiction_is_one_problem(
    overrides: list[str], world_size: int, part: str
) -> None:
    if world_size > 2:
        overrides = [*overrides, "batch={global_batch_size: 480, micro_batch_size: 1}"]
    elif world_size == 1:
        overrides = ["batch.global_batch_size=64", *overrides]
    found = problems(load_run("tiny", overrides), world_size)
    assert len(found) == 1 and part in found[0]


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (
            ["moe.pools=modality", "moe.image_experts=7"],
            "each pool needs at least moe.top_k (2)",
        ),
        (["moe.image_experts=3"], "which only moe.pools=modality uses"),
        (["moe.routing=expert_choice", "moe.capacity_factor=1"], "set moe.capacity_factor=0"),
        (["moe.capacity_factor=-1"], "below 0"),
        (["moe.capacity_group_size=0"], "must be at least 1"),
        (["moe.noise_std=0"], "must be positive"),
        (["loss.balance_weight=1"], "did you mean 'balance.balance_weight'?"),
        (["loss.router_z_weight=1"], "did you mean 'balance.router_z_weight'?"),
    ],
)
def test_a_section_refuses_what_cannot_be(overrides: list[str], part: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_run("tiny", overrides)
    assert part in str(caught.value)


@pytest.mark.parametrize(
    ("compute", "width", "backend"),
    [
        ("bf16", 60, "loop"),
        ("fp32", 61, "loop"),
        ("fp32", 60, "auto"),
        ("fp32", 60, "grouped"),
        ("bf16", 56, "grouped"),
    ],
)
def test_widths_that_fit_the_backend(compute: str, width: int, backend: str) -> None:
    run = load_run(
        "tiny",
        [f"precision.compute={compute}", f"moe={{expert_width: {width}, backend: {backend}}}"],
    )
    assert problems(run, 1) == []


@pytest.mark.parametrize(
    ("dtype", "width", "fits"),
    [
        (torch.float32, 62, False),
        (torch.float32, 60, True),
        (torch.bfloat16, 60, False),
        (torch.bfloat16, 56, True),
    ],
)
def test_the_refused_widths_are_those_that_the_grouped_product_refuses(
    dtype: torch.dtype, width: int, fits: bool
) -> None:
    weights = [
        torch.randn(2, *shape, dtype=dtype) for shape in ((width, 16), (16, width), (width, 16))
    ]
    with (
        contextlib.nullcontext()
        if fits
        else pytest.raises(RuntimeError, match="multiple of 16 bytes")
    ):
        grouped_swiglu(torch.randn(6, 16, dtype=dtype), torch.tensor([4, 2]), *weights)


def test_all_problems_come_in_one_error() -> None:
    run = load_run(
        "tiny", ["batch.global_batch_size=100", "parallel.expert_parallel_size=16", "optim.lr=0"]
    )
    with pytest.raises(ConfigError) as caught:
        check(run, 2, source="run.yaml")
    text = str(caught.value)
    # The three above, and the shards and the tokenizer that training needs.
    assert text.startswith("run.yaml: 5 problems:") and text.count("\n  - ") == 5


def test_only_training_needs_shards_and_a_tokenizer() -> None:
    run = load_run("tiny")
    check(run, 2, training=False)
    assert [problem.split(" ")[0] for problem in training_problems(run)] == [
        "data.train",
        "data.tokenizer",
    ]
    assert training_problems(load_run("tiny", ["data.train=[a]", "data.tokenizer=t"])) == []


@pytest.mark.parametrize("entry", ["{shards: t, wieght: 3}", "{shards: t, dropp: d}"])
def test_a_source_of_a_mixture_knows_its_settings(entry: str) -> None:
    with pytest.raises(
        ConfigError, match=r"data\.train\[0\]\.\w+: no such setting; did you mean '(weight|drop)'"
    ):
        load_run("tiny", [f"data.train=[{entry}]"])
