"""Several problems of a run are in one error, and one problem does not cause others."""

from __future__ import annotations

import pytest

from data_pipeline.common.errors import ConfigError
from pretrain.config.presets import load_run, load_unchecked_run
from pretrain.config.validate import check_run, problems, training_problems


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (
            ["moe.pools=modality", "moe.image_experts=7"],
            ["moe.pools", "7 experts", "1 for text", "moe.top_k (2)"],
        ),
        (["moe.image_experts=3"], ["moe.image_experts is 3", "moe.pools=modality"]),
        (
            ["moe.routing=expert_choice", "moe.capacity_factor=1"],
            ["moe.routing is expert_choice", "moe.capacity_factor=0"],
        ),
        (["moe.capacity_factor=-1"], ["moe.capacity_factor is -1.0", "at least 0"]),
        (["moe.capacity_group_size=0"], ["moe.capacity_group_size is 0", "at least 1"]),
        (["moe.noise_std=0"], ["moe.noise_std is 0.0", "above 0"]),
        (["loss.balance_weight=1"], ["loss.balance_weight", "'balance.balance_weight'"]),
        (["loss.router_z_weight=1"], ["loss.router_z_weight", "'balance.router_z_weight'"]),
    ],
)
def test_errors_of_a_single_section(overrides: list[str], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        load_run("tiny", overrides)
    for part in parts:
        assert part in str(error.value)


def test_all_problems_are_in_one_error() -> None:
    run, _ = load_unchecked_run(
        "tiny", ["batch.global_batch_size=100", "parallel.expert_parallel_size=16", "optim.lr=0"]
    )
    with pytest.raises(ConfigError) as error:
        check_run(run, 2, source="run.yaml")
    # The three above, and the missing shards and tokenizer.
    text = str(error.value)
    assert text.startswith("run.yaml: 5 problems:") and text.count("\n  - ") == 5


def test_problems_of_several_sections_are_in_one_error() -> None:
    with pytest.raises(ConfigError) as error:
        load_run("tiny", ["optim.lr=0", "moe={top_k: 9, noise_std: 0}", "data.workers=-1"])
    text = str(error.value)
    assert "4 problems" in text
    for setting in ("optim.lr", "moe.top_k", "moe.noise_std", "data.workers"):
        assert f"- {setting} is" in text


@pytest.mark.parametrize(
    "overrides",
    [
        ["moe.every=0", "model={patch_size: 0, num_heads: 0, pool_heads: 0, num_layers: 0}"],
        ["moe={num_experts: 0, every: 0, capacity_group_size: 0, capacity_factor: 1}"],
        ["moe={pools: modality, num_experts: 0}", "parallel.expert_parallel_size=0"],
        ["batch={global_batch_size: 0, micro_batch_size: 0}", "moe.capacity_factor=1"],
        ["data={caption_keys: [], caption_weights: []}", "schedule.total_steps=0"],
    ],
)
def test_invalid_sections_do_not_break_other_checks(overrides: list[str]) -> None:
    """Checks across sections are not computed from values that are invalid by themselves."""
    found = problems(load_unchecked_run("tiny", overrides)[0], 2)
    assert len(found) >= len(overrides)
    assert len(set(found)) == len(found)


def test_only_training_needs_shards_and_a_tokenizer() -> None:
    run = load_run("tiny")
    check_run(run, 2, training=False)
    settings = [problem.split(" ")[0] for problem in training_problems(run)]
    assert settings == ["data.train", "data.tokenizer"]
    assert training_problems(load_run("tiny", ["data.train=[a]", "data.tokenizer=t"])) == []
