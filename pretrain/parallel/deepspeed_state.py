"""Access to DeepSpeed's optimizer state: master weights and moments as tensors with stable names.

DeepSpeed saves them as pickles; here the tensors are read directly. Stages 1 and 2 keep one flat
float32 partition per parameter group, stage 3 one per sub-group; stage 0 leaves the state in
torch's optimizer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.parallel.errors import CheckpointError

MOMENTS = ("exp_avg", "exp_avg_sq")


def full_parameter(parameter: nn.Parameter) -> Tensor:
    """The full value of a parameter. With ZeRO-3, a copy on CPU, and the call is collective."""
    if not hasattr(parameter, "ds_id"):
        return parameter.detach()
    from deepspeed import zero

    with zero.GatheredParameters([parameter]):
        # On CPU, because the full weights of a partitioned model may not fit on one GPU.
        return parameter.detach().to("cpu", copy=True)


def optimizer_shard(optimizer: Any, zero_stage: int) -> dict[str, Tensor]:
    """Master weights and moments of this rank.

    Names are `GROUP/master`, `GROUP/exp_avg`, `GROUP/exp_avg_sq` and `GROUP/step`.
    """
    shard: dict[str, Tensor] = {}
    for name, master, state in _masters(optimizer, zero_stage):
        if zero_stage > 0:
            shard[f"{name}/master"] = master.detach()
        shard.update({f"{name}/{key}": state[key].detach() for key in MOMENTS if key in state})
        if "step" in state:
            shard[f"{name}/step"] = torch.as_tensor(state["step"], dtype=torch.float32).reshape(())
    return shard


def load_optimizer_shard(optimizer: Any, zero_stage: int, shard: Mapping[str, Tensor]) -> None:
    """Load a shard that `optimizer_shard` returned for the same layout.

    Raises:
        CheckpointError: A tensor is missing or has another size.
    """
    for name, master, _ in _masters(optimizer, zero_stage):
        if zero_stage > 0:
            _check_size(shard, f"{name}/master", master)
            master.data.copy_(shard[f"{name}/master"])
        if f"{name}/exp_avg" not in shard:
            continue  # saved before the first step
        # The fused optimizer reads the step count from the parameter's device.
        state = {"step": shard[f"{name}/step"].to(master.device).clone()}
        for key in MOMENTS:
            _check_size(shard, f"{name}/{key}", master)
            state[key] = shard[f"{name}/{key}"].to(master.device).clone().view_as(master)
        _torch_optimizer(optimizer, zero_stage).state[master] = state


def load_partitioned_weights(optimizer: Any) -> None:
    """Stage 3: copy the master weights into the partitioned weights, as an optimizer step does."""
    for group in range(len(optimizer.fp32_partitioned_groups_flat)):
        optimizer.fp16_partitioned_groups_flat[group].data.copy_(
            optimizer.fp32_partitioned_groups_flat[group].data
        )
        optimizer._unflatten_partitioned_parameters(group)
    if optimizer.persistent_parameters:
        persistent = optimizer.persistent_parameters
        persistent[0].partition(persistent)
        persistent[0].all_gather(persistent)


def _masters(optimizer: Any, zero_stage: int) -> list[tuple[str, Tensor, dict[str, Any]]]:
    """(name, float32 master tensor, its optimizer state) for everything that this rank updates."""
    inner = _torch_optimizer(optimizer, zero_stage)
    if zero_stage in (1, 2):
        tensors = list(optimizer.single_partition_of_fp32_groups)
    elif zero_stage == 3:
        tensors = list(optimizer.fp32_partitioned_groups_flat)
    else:
        tensors = [parameter for group in inner.param_groups for parameter in group["params"]]
    return [
        (f"group_{index:04d}", tensor, inner.state.get(tensor, {}))
        for index, tensor in enumerate(tensors)
    ]


def _torch_optimizer(optimizer: Any, zero_stage: int) -> torch.optim.Optimizer:
    return optimizer.optimizer if zero_stage > 0 else optimizer  # type: ignore[no-any-return]


def _check_size(shard: Mapping[str, Tensor], name: str, like: Tensor) -> None:
    if name not in shard or shard[name].numel() != like.numel():
        actual = f"{shard[name].numel()} elements" if name in shard else "no tensor"
        raise CheckpointError(
            f"the checkpoint has {actual} for {name!r}, but this run needs {like.numel()}; "
            f"the model, the layout or the ZeRO profile has changed since it was written"
        )
