"""Pretraining of sparse mixture-of-experts vision-language models.

from pretrain import load_model

model = load_model("runs/quickstart")
similarity = model.embed_images(["fox.jpg"]) @ model.embed_texts(["a fox", "an owl"]).T
print(model.caption(["fox.jpg"]))
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from data_pipeline import __version__

if TYPE_CHECKING:
    from pretrain.evaluate.trained_model import TrainedModel, load_model

__all__ = ["TrainedModel", "__version__", "load_model"]


def __getattr__(name: str) -> Any:
    # Imported on first use: importing torch takes seconds, which commands like `--help` must not.
    if name in ("load_model", "TrainedModel"):
        from pretrain.evaluate import trained_model

        return getattr(trained_model, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
