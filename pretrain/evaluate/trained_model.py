"""Loads a trained model from its run folder into one process."""

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


class TrainedModel(NamedTuple):
    """A model for evaluation or captioning."""

    run_dir: Path
    run: RunConfig
    model: VisionLanguageModel
    """In evaluation mode, float32, all experts in this process."""
    tokenizer: Tokenizer
    step: int
    device: torch.device


def load_trained_model(run_dir: Path, *, device: torch.device | None = None) -> TrainedModel:
    """Load the newest checkpoint of a run, independent of the layout that wrote it.

    Args:
        run_dir: The run folder.
        device: Device of the model; None for the first GPU, or the CPU without GPU.

    Raises:
        ConfigError: `run_dir` is not a run folder.
        TokenizerError: The tokenizer is missing, or is not the one of the checkpoint.
        CheckpointError: There is no checkpoint, all are incomplete, or its weights do not fit
            the run's model.
    """
    config = run_dir / CONFIG_FILE
    if not config.is_file():
        raise ConfigError(f"{run_dir} is not a run folder: it does not contain {CONFIG_FILE}")
    run = load_run(config)
    path = find_latest(run_dir / "checkpoints")
    if path is None:
        raise CheckpointError(
            f"{run_dir} contains no checkpoint; train the run, or wait for its first checkpoint"
        )

    meta = read_meta(path)
    tokenizer = Tokenizer.load(run_dir / TOKENIZER_FILE)
    _check_tokenizer(tokenizer, meta.state.get("tokenizer"), run_dir)
    # Float32 whatever the training precision: slower, but without rounding noise in the ranking.
    model = build_model(replace(run, precision=PrecisionConfig(compute="fp32")))
    _load_weights(model, load_model_weights(path), path)
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return TrainedModel(run_dir, run, model.to(device).eval(), tokenizer, meta.step, device)


def _check_tokenizer(tokenizer: Tokenizer, expected: str | None, run_dir: Path) -> None:
    if tokenizer.fingerprint != expected:
        raise TokenizerError(
            f"{run_dir / TOKENIZER_FILE} has fingerprint {tokenizer.fingerprint[:12]}, but the "
            f"checkpoint was trained with {str(expected)[:12]}; restore the tokenizer of this run"
        )


def _load_weights(model: VisionLanguageModel, weights: Mapping[str, Tensor], path: Path) -> None:
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    actual = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    different = sorted(
        name for name in {*expected, *actual} if expected.get(name) != actual.get(name)
    )
    if different:
        name = different[0]
        raise CheckpointError(
            f"{path} does not match the run's {CONFIG_FILE}: {len(different)} weights differ; "
            f"{name} is {actual.get(name, 'missing')} in the checkpoint and "
            f"{expected.get(name, 'missing')} in the model"
        )
    model.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
