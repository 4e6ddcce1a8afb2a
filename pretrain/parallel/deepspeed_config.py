"""The settings DeepSpeed gets: a profile of `ds_configs/` with the run's own numbers put in.

Every key has one owner. The run's YAML owns what is learned (batch, clipping, precision,
optimizer); the profile owns memory and wires. A key set on both sides is an error that names both
files, so no number is ever silently overruled. `ds_configs/README.md` has the list. DeepSpeed is
not imported here.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_pipeline.common.config import join_problems
from data_pipeline.common.errors import ConfigError
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
"""Keys of DeepSpeed that the run owns, and the setting of the run that stands for each."""

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
"""Keys of DeepSpeed that the profile owns."""


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
    near = difflib.get_close_matches(name_or_path, known, n=1)
    raise ConfigError(
        f"parallel.deepspeed is {name_or_path!r}: no such JSON file, and no profile of {folder} "
        f"({', '.join(known)})" + (f"; did you mean {near[0]!r}?" if near else "")
    )


def _profiles_folder() -> Path:
    """`ds_configs/`: inside the package when installed, beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "ds_configs"
    return installed if installed.is_dir() else package.parent / "ds_configs"


def load_profile(path: Path) -> dict[str, Any]:
    """The JSON object in a profile.

    Raises:
        ConfigError: The file cannot be read, is not a JSON object, or gives a key twice.
    """

    def no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        for key in keys:
            if keys.count(key) > 1:
                raise ConfigError(f"{path}: the key {key!r} is given twice; keep one of them")
        return dict(pairs)

    try:
        profile = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=no_twins)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read the DeepSpeed profile {path}: {error}") from error
    if not isinstance(profile, dict):
        raise ConfigError(f"{path}: a DeepSpeed profile is a JSON object, found {profile!r}")
    return profile


def zero_stage(profile_json: Mapping[str, Any], path: Path) -> int:
    """ZeRO stage of a profile, 0 to 3.

    Raises:
        ConfigError: The profile does not say, or says something else.
    """
    section = profile_json.get("zero_optimization")
    stage = section.get("stage") if isinstance(section, Mapping) else None
    if type(stage) is not int or not 0 <= stage <= 3:
        raise ConfigError(f"{path}: zero_optimization.stage is {stage!r}, but must be 0, 1, 2 or 3")
    return stage


def zero_stage_of(run: RunConfig) -> int | None:
    """ZeRO stage of the profile that a run names, for `pretrain.config.validate`; None where it
    does not matter.

    Raises:
        ConfigError: There is no such profile, or it is none.
    """
    if run.moe.backend != "deepspeed" or run.parallel.engine == "plain":
        return None
    path = profile_path(run.parallel.deepspeed)
    return zero_stage(load_profile(path), path)


def resolve(
    run: RunConfig,
    profile_json: Mapping[str, Any],
    profile_path: Path,
    run_path: Path,
    batch_plan: BatchPlan,
) -> dict[str, Any]:
    """The whole dict for `deepspeed.initialize`: the profile, then the run's own numbers.

    Args:
        run: The run.
        profile_json: Contents of the profile; left as they are.
        profile_path: Its file, for errors.
        run_path: The run's file, for errors.
        batch_plan: The run's batch, split over the ranks.

    Returns:
        A fresh dict of plain values. It names no optimizer: the engine hands DeepSpeed a ready one.

    Raises:
        ConfigError: Lists every key with two owners, unknown key and misplaced `"auto"`.
    """
    stage = zero_stage(profile_json, profile_path)
    found = _problems(profile_json, profile_path, run_path)
    if found:
        raise ConfigError(join_problems(found))
    resolved: dict[str, Any] = {
        "train_batch_size": batch_plan.global_batch_size,
        "train_micro_batch_size_per_gpu": batch_plan.micro_batch_size,
        "gradient_accumulation_steps": batch_plan.accumulation_steps,
        # With stage 0 DeepSpeed averages the ranks' norms and leaves experts out; our engine clips.
        "gradient_clipping": run.optim.clip_norm if stage > 0 else 0.0,
    }
    # Stage 0 with DeepSpeed's bf16 takes a phantom step at the start, so there the parameters stay
    # in fp32 and the model casts for itself.
    if run.precision.compute == "bf16" and stage > 0:
        resolved["bf16"] = {"enabled": True}
    copy = json.loads(json.dumps(profile_json))
    resolved.update({key: value for key, value in copy.items() if key in JSON_KEYS})
    return resolved


def resolve_for(run: RunConfig, run_path: Path, batch_plan: BatchPlan) -> dict[str, Any]:
    """`resolve` with the profile that the run names, read from its file."""
    path = profile_path(run.parallel.deepspeed)
    return resolve(run, load_profile(path), path, run_path, batch_plan)


def _problems(profile: Mapping[str, Any], path: Path, run_path: Path) -> list[str]:
    found = []
    for key, value in profile.items():
        if key in YAML_KEYS:
            if value != "auto":
                found.append(
                    f"{key} has two owners: {path} sets it to {json.dumps(value)}, and {run_path} sets it "
                    f'by {YAML_KEYS[key]}; remove it from {path.name}, or write "auto" there'
                )
        elif key in JSON_KEYS:
            found.extend(
                f'{path}: {name} is "auto", but the run has no setting for it; write a number, '
                f"or leave it out"
                for name in _autos(value, key)
            )
        else:
            near = difflib.get_close_matches(key, [*JSON_KEYS, *YAML_KEYS], n=1)
            found.append(
                f"{path}: {key}: no such key of a profile"
                + (f"; did you mean {near[0]!r}?" if near else f" ({', '.join(sorted(JSON_KEYS))})")
            )
    return found


def _autos(value: Any, name: str) -> list[str]:
    """Dotted names of every `"auto"` inside a value."""
    if isinstance(value, Mapping):
        return [found for key, inner in value.items() for found in _autos(inner, f"{name}.{key}")]
    return [name] if value == "auto" else []
