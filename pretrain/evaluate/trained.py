"""A trained model, taken from its run folder into one process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from data_pipeline.common.errors import CheckpointError, ConfigError, TokenizerError
from data_pipeline.content.tokenizer import Tokenizer
from pretrain.checkpoint import find_latest, load_model_weights, read_meta
from pretrain.config.presets import load_run
from pretrain.config.schema import PrecisionConfig, RunConfig
from pretrain.model import VisionLanguageModel, build_model

CONFIG_FILE, TOKENIZER_FILE = "config.yaml", "tokenizer.model"


class Trained(NamedTuple):
    """A model to judge or to write captions with."""

    run_dir: Path
    run: RunConfig
    model: VisionLanguageModel
    """In evaluation mode, float32, all experts in this process."""
    tokenizer: Tokenizer
    step: int
    device: torch.device


def load_trained(run_dir: Path, *, device: torch.device | None = None) -> Trained:
    """Load the newest checkpoint of a run, whatever layout wrote it.

    Args:
        run_dir: The run's folder.
        device: Where to put the model; the first GPU if there is one, otherwise the CPU.

    Raises:
        ConfigError: `run_dir` is no run folder.
        TokenizerError: Its tokenizer is missing, or not the one it was trained with.
        CheckpointError: It has no checkpoint, or none is whole, or it is of another model.
    """
    config = run_dir / CONFIG_FILE
    if not config.is_file():
        raise ConfigError(f"{run_dir} is not the folder of a run: it holds no {CONFIG_FILE}")
    run = load_run(config)
    path = find_latest(run_dir / "checkpoints")
    if path is None:
        raise CheckpointError(
            f"{run_dir} has no checkpoint yet; train first, or wait for the first one"
        )
    meta = read_meta(path)
    tokenizer = Tokenizer.load(run_dir / TOKENIZER_FILE)
    _check_tokenizer(tokenizer, meta.state.get("tokenizer"), run_dir)
    # Judged in float32 whatever it was trained in: slower, but no noise of rounding in the ranking.
    model = build_model(replace(run, precision=PrecisionConfig(compute="fp32")))
    _fill(model, load_model_weights(path), path)
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return Trained(run_dir, run, model.to(device).eval(), tokenizer, meta.step, device)


def _check_tokenizer(tokenizer: Tokenizer, expected: str | None, run_dir: Path) -> None:
    if tokenizer.fingerprint != expected:
        raise TokenizerError(
            f"{run_dir / TOKENIZER_FILE} has fingerprint {tokenizer.fingerprint[:12]}, but the checkpoint "
            f"was trained with {str(expected)[:12]}; put back the tokenizer of this run"
        )


def _fill(model: VisionLanguageModel, weights: Mapping[str, Tensor], path: Path) -> None:
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    differing = sorted(
        name
        for name in {*expected, *found}
        if expected.get(name, "nothing") != found.get(name, "nothing")
    )
    if differing:
        name = differing[0]
        raise CheckpointError(
            f"{path} is of another model than the run's config.yaml: {len(differing)} weights differ; "
            f"{name} is {found.get(name, 'missing')} there and {expected.get(name, 'missing')} here"
        )
    model.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
