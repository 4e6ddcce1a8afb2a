"""Exceptions of ranks and engines, in a module that does not import torch."""

from __future__ import annotations

from data_pipeline.common.errors import VlmError


class LayoutError(VlmError):
    """The number or arrangement of the started ranks does not fit the run."""


class LostRankError(VlmError):
    """Communication between ranks failed, usually because one of them exited."""


class TrainingError(VlmError):
    """Training does not recover from losses or gradients that are not finite."""


class CheckpointError(VlmError):
    """A checkpoint cannot be written, is corrupt, or belongs to another model or layout.

    Engines raise it too, so it is defined below `pretrain.checkpoint`, which exports it.
    """
