"""Resolved DeepSpeed configs: golden files, keys set twice, invalid profiles.

After an intended change, update the golden files with `WRITE_GOLDEN=1 pytest PATH_OF_THIS_FILE` and
review the diff.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.common.errors import ConfigError
from pretrain.config.batch import plan_batch
from pretrain.config.presets import load_run
from pretrain.config.schema import RunConfig
from pretrain.parallel.deepspeed_config import (
    JSON_KEYS,
    YAML_KEYS,
    load_profile,
    profile_path,
    resolve,
    resolve_for_run,
    zero_stage,
)

ROOT = Path(__file__).resolve().parents[3]
GOLDEN = ROOT / "tests" / "golden" / "deepspeed"
PROFILES = sorted(path.stem for path in (ROOT / "ds_configs").glob("*.json"))
RUN_PATH = Path("run.yaml")


def _run(*overrides: str) -> RunConfig:
    return load_run("tiny", overrides)


def _resolve(
    profile: dict[str, Any], run: RunConfig | None = None, world_size: int = 2
) -> dict[str, Any]:
    run = run or _run()
    plan = plan_batch(run.batch.global_batch_size, run.batch.micro_batch_size, world_size)
    return resolve(run, profile, Path("my.json"), RUN_PATH, plan)


def _compare(name: str, resolved: dict[str, Any]) -> None:
    path = GOLDEN / f"{name}.json"
    text = json.dumps(resolved, indent=2) + "\n"
    if os.environ.get("WRITE_GOLDEN"):
        path.write_text(text)
    assert text == path.read_text()


def test_list_of_profiles() -> None:
    assert PROFILES == ["zero0", "zero1", "zero2", "zero2_offload", "zero3"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("profile", PROFILES)
def test_profile_matches_golden_file(profile: str, precision: str) -> None:
    run = _run(
        f"parallel.deepspeed={profile}", f"precision.compute={precision}", "optim.clip_norm=0.5"
    )
    plan = plan_batch(run.batch.global_batch_size, run.batch.micro_batch_size, 2)
    _compare(f"{profile}-{precision}", resolve_for_run(run, RUN_PATH, plan))


@pytest.mark.parametrize(
    ("preset", "world_size"), [("s16", 8), ("b16", 16), ("l16", 64), ("h14", 64)]
)
def test_preset_matches_golden_file(preset: str, world_size: int) -> None:
    run = load_run(preset)
    plan = plan_batch(run.batch.global_batch_size, run.batch.micro_batch_size, world_size)
    _compare(f"preset-{preset}", resolve_for_run(run, RUN_PATH, plan))


def test_stage_0_has_neither_bf16_nor_clipping() -> None:
    resolved = _resolve(
        {"zero_optimization": {"stage": 0}}, _run("precision.compute=bf16", "optim.clip_norm=0.5")
    )
    assert "bf16" not in resolved and resolved["gradient_clipping"] == 0.0


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_higher_stages_take_bf16_and_clipping_from_the_yaml(stage: int) -> None:
    profile = {"zero_optimization": {"stage": stage}}
    resolved = _resolve(profile, _run("precision.compute=bf16", "optim.clip_norm=0.5"))
    assert resolved["bf16"] == {"enabled": True} and resolved["gradient_clipping"] == 0.5
    assert "bf16" not in _resolve(profile, _run())


def test_batch_keys_are_consistent() -> None:
    resolved = _resolve({"zero_optimization": {"stage": 1}}, world_size=2)
    assert (
        resolved["train_micro_batch_size_per_gpu"] * resolved["gradient_accumulation_steps"] * 2
        == resolved["train_batch_size"]
        == 256
    )


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train_batch_size", 256),
        ("gradient_clipping", 1.0),
        ("bf16", {"enabled": True}),
        ("optimizer", {"type": "AdamW"}),
        ("train_micro_batch_size_per_gpu", 1),
        ("scheduler", {}),
    ],
)
def test_key_set_twice_is_an_error_that_names_both_files(key: str, value: object) -> None:
    with pytest.raises(ConfigError) as caught:
        _resolve({"zero_optimization": {"stage": 1}, key: value})
    text = str(caught.value)
    for message in (
        f"{key} is set twice",
        json.dumps(value),
        "my.json",
        "run.yaml",
        YAML_KEYS[key],
    ):
        assert message in text


def test_auto_takes_the_value_of_the_yaml() -> None:
    expected = _resolve({"zero_optimization": {"stage": 1}})
    resolved = _resolve(
        {
            "zero_optimization": {"stage": 1},
            "train_batch_size": "auto",
            "gradient_clipping": "auto",
            "bf16": "auto",
            "optimizer": "auto",
        }
    )
    assert resolved == expected


@pytest.mark.parametrize(
    ("profile", "message"),
    [
        (
            {"zero_optimization": {"stage": 1, "reduce_bucket_size": "auto"}},
            'zero_optimization.reduce_bucket_size is "auto"',
        ),
        (
            {"zero_optimization": {"stage": 1}, "zero_optimisation": {}},
            "zero_optimisation: unknown key; did you mean 'zero_optimization'?",
        ),
        (
            {"zero_optimization": {"stage": 4}},
            "zero_optimization.stage is 4",
        ),
        ({"zero_optimization": {"stage": True}}, "zero_optimization.stage is True"),
        ({}, "zero_optimization.stage is None"),
    ],
)
def test_invalid_profiles(profile: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        _resolve(profile)
    assert message in str(caught.value) and "my.json" in str(caught.value)


def test_all_problems_of_a_profile_are_in_one_error() -> None:
    with pytest.raises(ConfigError, match="2 problems"):
        _resolve({"zero_optimization": {"stage": 1}, "gradient_clipping": 1, "nonsense": 1})


def test_the_profile_is_not_modified_by_the_result() -> None:
    profile = {"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}}
    before = json.dumps(profile)
    _resolve(profile)["zero_optimization"]["offload_optimizer"]["device"] = "nvme"
    assert json.dumps(profile) == before


def test_profile_by_name_and_by_path(tmp_path: Path) -> None:
    assert profile_path("zero2") == ROOT / "ds_configs" / "zero2.json"
    custom = tmp_path / "custom.json"
    custom.write_text('{"zero_optimization": {"stage": 3}}')
    assert profile_path(str(custom)) == custom
    assert zero_stage(load_profile(custom), custom) == 3
    with pytest.raises(ConfigError, match=r"parallel\.deepspeed is 'zer01'.*'zero1'"):
        profile_path("zer01")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot read"),
        ("[]", "JSON object"),
        ('{"a": 1, "a": 2}', "duplicate key 'a'"),
    ],
)
def test_files_that_are_not_profiles(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "p.json"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_profile(path)
    assert message in str(caught.value) and str(path) in str(caught.value)


def test_key_tables_are_disjoint_and_listed_in_the_readme() -> None:
    assert not JSON_KEYS & set(YAML_KEYS)
    readme = (ROOT / "ds_configs" / "README.md").read_text()
    assert [key for key in [*YAML_KEYS, *JSON_KEYS] if f"`{key}`" not in readme] == []


@pytest.mark.parametrize(
    ("section", "part"),
    [
        ({"offload_optimizer": {"device": "nvme", "nvme_path": "/x"}}, '"nvme"'),
        ({"offload_param": {"device": "nvme"}}, "offload_param"),
        ({"mics_shard_size": 2}, "mics_shard_size is not supported"),
        ({"zenflow": {"topk_ratio": 0.1}}, "zenflow is not supported"),
        ({"round_robin_gradients": True}, "round_robin_gradients is not supported"),
    ],
)
def test_zero_settings_that_checkpoints_do_not_support(
    section: dict[str, Any], part: str, tmp_path: Path
) -> None:
    path = tmp_path / "profile.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3} | section}))
    run = load_run("tiny", [f"parallel.deepspeed={path}"])
    with pytest.raises(ConfigError) as error:
        resolve_for_run(run, tmp_path / "run.yaml", plan_batch(256, 64, 1))
    assert part in str(error.value)
    supported = {"round_robin_gradients": False, "offload_optimizer": {"device": "cpu"}}
    path.write_text(json.dumps({"zero_optimization": {"stage": 2} | supported}))
    resolve_for_run(run, tmp_path / "run.yaml", plan_batch(256, 64, 1))
