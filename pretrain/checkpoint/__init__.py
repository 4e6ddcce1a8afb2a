"""Saving a run and going on from it."""

from pretrain.checkpoint.format import CheckpointEngine, DamagedCheckpointError, FileRecord, Meta
from pretrain.checkpoint.reader import (
    Loaded,
    Resumed,
    find_latest,
    load,
    load_latest,
)
from pretrain.checkpoint.verify import read_meta
from pretrain.checkpoint.weights import load_model_weights
from pretrain.checkpoint.writer import save

__all__ = [
    "CheckpointEngine",
    "DamagedCheckpointError",
    "FileRecord",
    "Loaded",
    "Meta",
    "Resumed",
    "find_latest",
    "load",
    "load_latest",
    "load_model_weights",
    "read_meta",
    "save",
]
