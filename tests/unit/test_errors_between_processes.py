"""Errors keep their class on the way to another process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from data_pipeline.common.errors import (
    ConfigError,
    DataError,
    StorageError,
    VlmError,
    error_from_values,
    error_values,
)
from data_pipeline.content.tokenizer import TokenizerError
from data_pipeline.loading.worker_process import WorkerError
from pretrain.checkpoint import CheckpointError
from pretrain.parallel.communicator import LocalCommunicator
from pretrain.parallel.errors import LayoutError, LostRankError
from pretrain.train.run_folder import run_on_rank_zero

CLASSES = (
    VlmError,
    ConfigError,
    DataError,
    StorageError,
    TokenizerError,
    CheckpointError,
    LayoutError,
    LostRankError,
)


def raises(error: Exception) -> Callable[[], None]:
    def work() -> None:
        raise error

    return work


@pytest.mark.parametrize("error_class", CLASSES)
def test_the_class_survives(error_class: type[VlmError]) -> None:
    values = json.loads(json.dumps(error_values(error_class("text"))))
    for error in (error_from_values(values), WorkerError(tuple(values)).error()):
        assert type(error) is error_class and str(error) == "text"
    communicator = LocalCommunicator(torch.device("cpu"))
    with pytest.raises(error_class, match="text") as caught:
        run_on_rank_zero(communicator, Path("out"), raises(error_class("text")))
    assert caught.type is error_class


def test_other_classes_become_the_base_class() -> None:
    for module, name in (("no.such.module", "X"), ("builtins", "SystemExit"), ("os", "system")):
        error = error_from_values([module, name, "text"])
        assert type(error) is VlmError and str(error) == "text"


def test_an_error_of_the_file_system_names_the_run_folder() -> None:
    communicator = LocalCommunicator(torch.device("cpu"))
    with pytest.raises(StorageError, match=r"run folder out.*No space"):
        run_on_rank_zero(communicator, Path("out"), raises(OSError(28, "No space left")))
