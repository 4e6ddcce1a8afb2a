"""A streaming data loader for image-text pairs in WebDataset shards, for any PyTorch trainer.

    from data_pipeline import DataConfig, Loader, SourceConfig

    data = DataConfig(train=(SourceConfig(shards="data/own"),), tokenizer="tokenizer.model")
    loader = Loader.open(data, image_size=224, context_length=64, global_batch_size=256)
    for batches, state in loader.steps():
        ...

The names below are imported on first use: importing torch takes seconds.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data_pipeline.content.tokenizer import Tokenizer
    from data_pipeline.loading.batch_spec import BatchSpec, RankInfo
    from data_pipeline.loading.loader import Loader
    from data_pipeline.loading.sources import Source
    from data_pipeline.order.state import LoaderState
    from data_pipeline.samples import Batch, SampleProblem
    from data_pipeline.settings import AugmentConfig, DataConfig, FilterConfig, SourceConfig
    from data_pipeline.shards.manifest import Manifest

__all__ = [
    "AugmentConfig",
    "Batch",
    "BatchSpec",
    "DataConfig",
    "FilterConfig",
    "Loader",
    "LoaderState",
    "Manifest",
    "RankInfo",
    "SampleProblem",
    "Source",
    "SourceConfig",
    "Tokenizer",
    "__version__",
]

try:
    __version__ = version("vlmoe")  # from pyproject.toml, the only place that states it
except PackageNotFoundError:  # a source tree that is not installed
    __version__ = "0+unknown"

_MODULES = {
    "Loader": "loading.loader",
    "LoaderState": "order.state",
    "BatchSpec": "loading.batch_spec",
    "RankInfo": "loading.batch_spec",
    "Source": "loading.sources",
    "Manifest": "shards.manifest",
    "Tokenizer": "content.tokenizer",
    "Batch": "samples",
    "SampleProblem": "samples",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES.get(name, 'settings')}"), name)
