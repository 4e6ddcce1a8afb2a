"""The model: what is computed, without a word about machines.

Names are fetched when they are first used: `pretrain.model.count` is arithmetic that a person asks
for at the console, and must not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pretrain.model.build import build_model
    from pretrain.model.vision_language import ModelOutput, VisionLanguageModel

__all__ = ["ModelOutput", "VisionLanguageModel", "build_model"]

_HOMES = {
    "ModelOutput": "pretrain.model.vision_language",
    "VisionLanguageModel": "pretrain.model.vision_language",
    "build_model": "pretrain.model.build",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
