"""Saving and loading checkpoints."""

from pretrain.checkpoint.files import FileRecord
from pretrain.checkpoint.format import CorruptCheckpointError, Meta
from pretrain.checkpoint.reader import ResumedCheckpoint, find_latest, load, load_latest
from pretrain.checkpoint.saved_state import load_model_weights
from pretrain.checkpoint.verify import read_meta
from pretrain.checkpoint.writer import save
from pretrain.parallel.errors import CheckpointError

__all__ = [
    "CheckpointError",
    "CorruptCheckpointError",
    "FileRecord",
    "Meta",
    "ResumedCheckpoint",
    "find_latest",
    "load",
    "load_latest",
    "load_model_weights",
    "read_meta",
    "save",
]
