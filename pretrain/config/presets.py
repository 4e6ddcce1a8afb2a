"""Loading of a `RunConfig` from a YAML file or preset, with command-line overrides.

Presets are run files that are part of the package. A run file usually extends one (`extends: b16`)
and contains only the settings that differ.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from data_pipeline.common.config import apply_overrides, from_mapping, setting_names
from data_pipeline.common.errors import ConfigError, VlmError
from data_pipeline.common.origins import Origins, find_origins
from data_pipeline.common.yaml_file import load_layers, merge_layers
from pretrain.config.paths import relative_to_file
from pretrain.config.schema import RunConfig

_PRESETS_FOLDER = Path(__file__).resolve().parent / "presets"


def preset_names() -> tuple[str, ...]:
    """Names of all presets in alphabetical order."""
    return tuple(sorted(path.stem for path in _PRESETS_FOLDER.glob("*.yaml")))


def preset_path(name: str) -> Path | None:
    """The file of a preset, or None if there is no preset of that name."""
    return _PRESETS_FOLDER / f"{name}.yaml" if name in preset_names() else None


def run_path(path_or_preset: str | Path) -> Path:
    """The run file for a path or a preset name; an existing file takes precedence.

    Raises:
        ConfigError: There is neither a file nor a preset of that name.
    """
    path = Path(path_or_preset)
    if path.is_file():
        return path
    preset = preset_path(str(path_or_preset))
    if preset is not None:
        return preset
    matches = difflib.get_close_matches(str(path_or_preset), preset_names(), n=1)
    hint = f"; did you mean {matches[0]!r}?" if matches else ""
    raise ConfigError(
        f"{path_or_preset}: no such file, and no preset of that name "
        f"(presets: {', '.join(preset_names())}){hint}"
    )


def load_run(path_or_preset: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Load the configuration of a run.

    Args:
        path_or_preset: A YAML file, or the name of a preset.
        overrides: Settings such as `optim.lr=3e-4` that take precedence over the file.

    Returns:
        The run, with the vocabulary size of its tokenizer if `model.vocab_size` is 0. Each section
        has been checked separately; `pretrain.config.validate` checks settings across sections.

    Raises:
        ConfigError: Lists all unknown keys, wrong types and problems of sections, and where their
            values were set.
    """
    return with_vocab_size(_load(path_or_preset, overrides, check=True)[0])


def load_unchecked_run(
    path_or_preset: str | Path, overrides: Sequence[str] = ()
) -> tuple[RunConfig, Origins]:
    """As `load_run`, for a caller that then calls `pretrain.config.validate.check_run`: one error
    lists the problems of sections together with those across sections.

    Returns:
        The run, without the vocabulary size of its tokenizer (`with_vocab_size`), and where its
        settings were set.

    Raises:
        ConfigError: Lists all unknown keys and wrong types.
    """
    return _load(path_or_preset, overrides, check=False)


def _load(
    path_or_preset: str | Path, overrides: Sequence[str], *, check: bool
) -> tuple[RunConfig, Origins]:
    path = run_path(path_or_preset)
    layers = [
        (file, mapping if _is_preset(file) else relative_to_file(mapping, file.parent))
        for file, mapping in load_layers(path, preset_path)
    ]
    origins = Origins(
        source=_label(path),
        where=find_origins(((_label(file), mapping) for file, mapping in layers), overrides),
        names=setting_names(RunConfig),
    )
    mapping = apply_overrides(merge_layers(layers), overrides)
    return from_mapping(RunConfig, mapping, source=origins, check=check), origins


def with_vocab_size(run: RunConfig) -> RunConfig:
    """The run with the vocabulary size of its tokenizer, if the settings leave it to that.

    If the tokenizer cannot be read, the size stays 0, which `validate.check_run` reports.
    """
    if run.model.vocab_size or not run.data.tokenizer:
        return run
    # Imports sentencepiece, which most commands do not need.
    from data_pipeline.content.tokenizer import Tokenizer

    try:
        vocab_size = Tokenizer.load(run.data.tokenizer).vocab_size
    except VlmError:
        return run
    return replace(run, model=replace(run.model, vocab_size=vocab_size))


def _label(path: Path) -> str:
    return f"preset {path.stem}" if _is_preset(path) else str(path)


def _is_preset(path: Path) -> bool:
    return path == preset_path(path.stem)
