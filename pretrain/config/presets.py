"""From a YAML file or the name of a preset, and settings on the command line, to a `RunConfig`.

Presets are ordinary run files that ship with the program. A run file usually starts from one with
`extends: b16` and says only what differs.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

from data_pipeline.common.config import apply_overrides, from_mapping, load_yaml
from data_pipeline.common.errors import ConfigError
from pretrain.config.schema import RunConfig

_FOLDER = Path(__file__).resolve().parent / "presets"


def preset_names() -> tuple[str, ...]:
    """Names of the presets that ship with the program, in alphabetical order."""
    return tuple(sorted(path.stem for path in _FOLDER.glob("*.yaml")))


def preset_path(name: str) -> Path | None:
    """The file of a preset, or None when there is no preset of that name."""
    return _FOLDER / f"{name}.yaml" if name in preset_names() else None


def run_path(path_or_preset: str | Path) -> Path:
    """The run file that a path or the name of a preset means; a file of that name wins.

    Raises:
        ConfigError: It is neither.
    """
    path = Path(path_or_preset)
    if path.is_file():
        return path
    preset = preset_path(str(path_or_preset))
    if preset is not None:
        return preset
    near = difflib.get_close_matches(str(path_or_preset), preset_names(), n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ConfigError(
        f"{path_or_preset}: no such file, and no preset either ({', '.join(preset_names())}){hint}"
    )


def load_run(path_or_preset: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run.

    Args:
        path_or_preset: A YAML file, or the name of a preset.
        overrides: Settings such as `optim.lr=3e-4` that win over the file.

    Returns:
        The run, each section checked by itself; `pretrain.config.validate` checks them together.

    Raises:
        ConfigError: Lists every unknown key, wrong type and impossible section.
    """
    path = run_path(path_or_preset)
    mapping = apply_overrides(load_yaml(path, preset_path), overrides)
    source = f"{path}{' with settings from the command line' if overrides else ''}"
    return from_mapping(RunConfig, mapping, source=source)
