"""A run folder with a small random model, for tests of the evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from data_pipeline.common.config import apply_overrides, dump_yaml, from_mapping
from data_pipeline.content.tokenizer import Tokenizer
from pretrain.checkpoint import save
from pretrain.config.schema import RunConfig
from pretrain.model import VisionLanguageModel, build_model
from pretrain.parallel.communicator import LocalCommunicator
from pretrain.parallel.layout import Layout
from pretrain.parallel.state_fragments import VALUE, WEIGHT, Fragment, StateReader
from tests.support.shape_dataset import ShapeDataset

SMALL = [
    "model.width=32",
    "model.num_layers=3",
    "model.num_heads=2",
    "model.pool_heads=2",
    "model.ffn_width=48",
    "model.fusion_layer=1",
    "model.patch_size=16",
    "model.context_length=16",
    "model.embed_dim=24",
    "moe.num_experts=4",
    "moe.expert_width=16",
    "eval.batch_size=24",
    "eval.caption_samples=9",
    "data.workers=0",
]


@dataclass
class ExpertParallelWriter:
    """An engine that saves experts in two parts, as two expert-parallel ranks would."""

    model: VisionLanguageModel

    @property
    def communicator(self) -> LocalCommunicator:
        return LocalCommunicator(torch.device("cpu"))

    @property
    def layout(self) -> Layout:
        return Layout(
            world_size=2, expert_parallel_size=2, zero_stage=1, precision="fp32", num_experts=4
        )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self.model.state_dict().items()}

    def state_fragments(self) -> Iterator[Fragment]:
        buffers = {name for name, _ in self.model.named_buffers()}
        for name, tensor in self.model.state_dict().items():
            values, kind = tensor.reshape(-1), VALUE if name in buffers else WEIGHT
            if ".experts." not in name:
                yield Fragment(name, 0, {kind: values})
                continue
            half = len(values) // 2
            yield Fragment(name, half, {kind: values[half:]})
            yield Fragment(name, 0, {kind: values[:half]})

    def load_state(self, reader: StateReader) -> None:
        raise NotImplementedError


class RunFolder:
    """A run folder as written by training."""

    def __init__(self, path: Path, shapes: ShapeDataset) -> None:
        self.path = path
        overrides = [
            *SMALL,
            *shapes.overrides,
            f"eval.sets=[{{name: held, shards: {shapes.folder}}}]",
        ]
        self.run = from_mapping(RunConfig, apply_overrides({}, overrides))
        self.model = build_model(self.run)
        torch.manual_seed(0)
        with torch.no_grad():  # large random weights, so that captions differ
            for parameter in self.model.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
        self.tokenizer = Tokenizer.load(shapes.tokenizer)

        path.mkdir()
        (path / "config.yaml").write_text(dump_yaml(self.run))
        (path / "tokenizer.model").write_bytes(self.tokenizer.model_bytes)
        save(
            ExpertParallelWriter(self.model),
            root=path / "checkpoints",
            step=12,
            state_json={"tokenizer": self.tokenizer.fingerprint},
        )
