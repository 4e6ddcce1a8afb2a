"""Checked access to the tensors of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from data_pipeline.common.tables import counted
from pretrain.model.vision_language import VisionLanguageModel
from pretrain.parallel.errors import CheckpointError
from pretrain.parallel.tensor_names import BIAS_SUFFIX


def load_buffers(model: VisionLanguageModel, tensors: Mapping[str, Tensor]) -> None:
    """Load the buffers of a model: the expert biases.

    Raises:
        CheckpointError: The checkpoint lacks a bias, or has one that this run's model does not.
    """
    buffers = dict(model.named_buffers())
    unexpected = sorted(n for n in tensors if n.endswith(BIAS_SUFFIX) and n not in buffers)
    if unexpected:
        raise CheckpointError(
            f"the checkpoint has expert biases in {counted(len(unexpected), 'layer')}, such as "
            f"{unexpected[0]!r}, but this run's model has none there; without them tokens would be "
            f"routed to other experts. Set balance.bias and balance.bias_per_modality as in "
            f"config.yaml of the run folder, or use another run folder"
        )
    for name, buffer in buffers.items():
        buffer.copy_(checked_tensor(tensors, name, buffer))


def checked_tensor(tensors: Mapping[str, Tensor], name: str, like: Tensor) -> Tensor:
    """The tensor of a checkpoint with this name, which must have the shape of `like`.

    Raises:
        CheckpointError: There is no such tensor, or it has another shape.
    """
    tensor = tensors.get(name)
    if tensor is None or tensor.shape != like.shape:
        actual = f"no {name!r}" if tensor is None else f"{name!r} of shape {list(tensor.shape)}"
        raise CheckpointError(
            f"the checkpoint has {actual}, but this run's model needs shape {list(like.shape)}. "
            f"Set the model, moe and balance sections as in config.yaml of the run folder "
            f"(balance.bias and balance.bias_per_modality determine the biases), or use another "
            f"run folder"
        )
    return tensor
