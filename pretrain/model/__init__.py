"""The vision-language model, independent of parallelism and hardware.

Public names are imported on first use: `pretrain.model.count` is plain arithmetic for commands such
as `vlmoe plan`, which should not wait for the import of torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pretrain.model.build import build_model
    from pretrain.model.vision_language import ModelOutput, VisionLanguageModel

__all__ = ["ModelOutput", "VisionLanguageModel", "build_model"]

_MODULES = {
    "ModelOutput": "pretrain.model.vision_language",
    "VisionLanguageModel": "pretrain.model.vision_language",
    "build_model": "pretrain.model.build",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
