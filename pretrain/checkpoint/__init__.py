"""Saving and loading checkpoints."""

from pretrain.checkpoint.files import FileRecord
from pretrain.checkpoint.format import CorruptCheckpointError, Meta
from pretrain.checkpoint.reader import (
    LoadedState,
    ResumedCheckpoint,
    find_latest,
    load,
    load_latest,
)
from pretrain.checkpoint.verify import read_meta
from pretrain.checkpoint.weights import load_model_weights
from pretrain.checkpoint.writer import save
from pretrain.parallel.errors import CheckpointError

__all__ = [
    "CheckpointError",
    "CorruptCheckpointError",
    "FileRecord",
    "LoadedState",
    "Meta",
    "ResumedCheckpoint",
    "find_latest",
    "load",
    "load_latest",
    "load_model_weights",
    "read_meta",
    "save",
]
