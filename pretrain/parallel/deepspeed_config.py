"""The DeepSpeed config of a run: a profile of `ds_configs/` plus values of the run's YAML.

Every key is set in exactly one of the two files. The YAML sets what affects training results
(batch, clipping, precision, optimizer); the profile sets memory and communication. A key set in
both is an error that names both files. `ds_configs/README.md` lists the keys.

This module does not import DeepSpeed.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_pipeline.common.errors import ConfigError
from data_pipeline.common.problems import join_problems
from pretrain.config.batch import BatchPlan
from pretrain.config.schema import RunConfig

YAML_KEYS: dict[str, str] = {
    "train_batch_size": "batch.global_batch_size",
    "train_micro_batch_size_per_gpu": "batch.micro_batch_size",
    "gradient_accumulation_steps": "batch.global_batch_size and batch.micro_batch_size",
    "gradient_clipping": "optim.clip_norm",
    "bf16": "precision.compute",
    "fp16": "precision.compute",
    "amp": "precision.compute",
    "torch_autocast": "precision.compute",
    "data_types": "precision.compute",
    "optimizer": "optim",
    "zero_allow_untested_optimizer": "optim",
    "scheduler": "schedule",
    "activation_checkpointing": "model.activation_checkpointing",
    "steps_per_print": "log.every_steps",
    "tensorboard": "log",
    "wandb": "log",
    "csv_monitor": "log",
}
"""DeepSpeed keys that are set by the run's YAML, with the setting that determines each."""

JSON_KEYS: frozenset[str] = frozenset(
    {
        "zero_optimization",
        "zero_force_ds_cpu_optimizer",
        "communication_data_type",
        "prescale_gradients",
        "gradient_predivide_factor",
        "disable_allgather",
        "aio",
        "comms_logger",
        "flops_profiler",
        "wall_clock_breakdown",
        "memory_breakdown",
        "dump_state",
    }
)
"""DeepSpeed keys that are set by the profile."""


def profile_path(name_or_path: str) -> Path:
    """The file of a profile.

    Args:
        name_or_path: A name in `ds_configs/`, such as `zero1`, or the path of a JSON file.

    Raises:
        ConfigError: There is no such profile or file.
    """
    path = Path(name_or_path)
    if path.suffix == ".json" and path.is_file():
        return path
    folder = _profiles_folder()
    known = sorted(p.stem for p in folder.glob("*.json"))
    if name_or_path in known:
        return folder / f"{name_or_path}.json"
    closest = difflib.get_close_matches(name_or_path, known, n=1)
    raise ConfigError(
        f"parallel.deepspeed is {name_or_path!r}: no such JSON file, and no such profile in "
        f"{folder} ({', '.join(known)})" + (f"; did you mean {closest[0]!r}?" if closest else "")
    )


def _profiles_folder() -> Path:
    """`ds_configs/`: inside the installed package, or next to it in a source checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "ds_configs"
    return installed if installed.is_dir() else package.parent / "ds_configs"


def load_profile(path: Path) -> dict[str, Any]:
    """The JSON object in a profile.

    Raises:
        ConfigError: The file cannot be read, is not a JSON object, or has a duplicate key.
    """

    def reject_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        for key in keys:
            if keys.count(key) > 1:
                raise ConfigError(f"{path}: duplicate key {key!r}; remove one of them")
        return dict(pairs)

    try:
        profile = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=reject_duplicates)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read the DeepSpeed profile {path}: {error}") from error
    if not isinstance(profile, dict):
        raise ConfigError(f"{path}: a DeepSpeed profile must be a JSON object, not {profile!r}")
    return profile


def zero_stage(profile_json: Mapping[str, Any], path: Path) -> int:
    """ZeRO stage of a profile, 0 to 3.

    Raises:
        ConfigError: `zero_optimization.stage` is missing or invalid.
    """
    section = profile_json.get("zero_optimization")
    stage = section.get("stage") if isinstance(section, Mapping) else None
    if type(stage) is not int or not 0 <= stage <= 3:
        raise ConfigError(f"{path}: zero_optimization.stage is {stage!r}, but must be 0, 1, 2 or 3")
    return stage


def resolve(
    run: RunConfig,
    profile_json: Mapping[str, Any],
    profile_path: Path,
    run_path: Path,
    batch_plan: BatchPlan,
) -> dict[str, Any]:
    """The config for `deepspeed.initialize`: the profile plus the values of the run.

    Args:
        run: The run.
        profile_json: Contents of the profile; not modified.
        profile_path: File of the profile, for error messages.
        run_path: File of the run, for error messages.
        batch_plan: Batch sizes and accumulation of the run.

    Returns:
        A new dict of plain values. It has no optimizer: the engine passes one to DeepSpeed.

    Raises:
        ConfigError: Lists every key set in both files, unknown key and unsupported `"auto"`.
    """
    stage = zero_stage(profile_json, profile_path)
    problems = _problems(profile_json, profile_path, run_path)
    if problems:
        raise ConfigError(join_problems(problems))
    resolved: dict[str, Any] = {
        "train_batch_size": batch_plan.global_batch_size,
        "train_micro_batch_size_per_gpu": batch_plan.micro_batch_size,
        "gradient_accumulation_steps": batch_plan.accumulation_steps,
        # At stage 0 DeepSpeed averages the ranks' norms and ignores experts; `DeepSpeedEngine`
        # clips instead.
        "gradient_clipping": run.optim.clip_norm if stage > 0 else 0.0,
    }
    # At stage 0 DeepSpeed's bf16 optimizer would run an extra step at the start. So the parameters
    # stay in fp32 and the model casts its inputs itself.
    if run.precision.compute == "bf16" and stage > 0:
        resolved["bf16"] = {"enabled": True}
    copy = json.loads(json.dumps(profile_json))
    resolved.update({key: value for key, value in copy.items() if key in JSON_KEYS})
    return resolved


def resolve_for_run(run: RunConfig, run_path: Path, batch_plan: BatchPlan) -> dict[str, Any]:
    """`resolve` with the profile of the run, read from its file."""
    path = profile_path(run.parallel.deepspeed)
    return resolve(run, load_profile(path), path, run_path, batch_plan)


def _problems(profile: Mapping[str, Any], path: Path, run_path: Path) -> list[str]:
    """Messages for keys set in both files, unsupported `"auto"` values and unknown keys."""
    problems = _unsupported_zero_settings(profile.get("zero_optimization"), path)
    for key, value in profile.items():
        if key in YAML_KEYS:
            if value != "auto":
                problems.append(
                    f"{key} is set twice: to {json.dumps(value)} in {path}, and by "
                    f"{YAML_KEYS[key]} in {run_path}; remove it from {path.name}, or set it to "
                    f'"auto" there'
                )
        elif key in JSON_KEYS:
            problems.extend(
                f'{path}: {name} is "auto", but the run has no setting for it; set a value, or '
                f"remove it"
                for name in _auto_keys(value, key)
            )
        else:
            closest = difflib.get_close_matches(key, [*JSON_KEYS, *YAML_KEYS], n=1)
            hint = (
                f"; did you mean {closest[0]!r}?"
                if closest
                else f" ({', '.join(sorted(JSON_KEYS))})"
            )
            problems.append(f"{path}: {key}: unknown key" + hint)
    return problems


def _unsupported_zero_settings(section: Any, path: Path) -> list[str]:
    """Settings whose state checkpoints cannot read, or with which DeepSpeed mixes up gradients."""
    if not isinstance(section, Mapping):
        return []
    problems = [
        f'{path}: zero_optimization.{name}.device is "nvme", which checkpoints do not support; use '
        f'"cpu"'
        for name in ("offload_optimizer", "offload_param")
        if isinstance(section.get(name), Mapping) and section[name].get("device") == "nvme"
    ]
    problems += [
        f"{path}: zero_optimization.{name} is not supported; remove it"
        for name in ("mics_shard_size", "zenflow", "round_robin_gradients")
        if section.get(name) not in (None, False, -1)
    ]
    return problems


def _auto_keys(value: Any, name: str) -> list[str]:
    """Dotted names of every `"auto"` inside a value."""
    if isinstance(value, Mapping):
        names: list[str] = []
        for key, inner in value.items():
            names.extend(_auto_keys(inner, f"{name}.{key}"))
        return names
    return [name] if value == "auto" else []
