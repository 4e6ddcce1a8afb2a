"""The full float32 weights that an engine's optimizer updates, for comparisons between engines.

With ZeRO and bfloat16, the weights of the module are rounded copies of these master weights.
"""

from __future__ import annotations

from torch import Tensor, nn

from pretrain.optim.groups import is_expert
from pretrain.parallel.engine import TrainEngine, slice_name


def master_weights(engine: TrainEngine) -> dict[str, Tensor]:
    """Every weight of this rank on CPU, float32, named as in `TrainEngine.model_tensors`.

    Unlike `model_tensors`, every rank returns all weights that it holds, so that diverged replicas
    can be detected. Collective.
    """
    weights = {}
    for name, parameter in engine.model.named_parameters():
        full = _full_master(parameter, engine.layout.zero_stage)
        # `copy`: on CPU this would otherwise alias the parameter, which the next step updates.
        weights[_checkpoint_name(name, engine)] = full.detach().to("cpu", copy=True)
    return weights


def destroy_engine(engine: TrainEngine) -> None:
    """Free DeepSpeed's process-wide references to an engine; it cannot be used afterwards."""
    deepspeed_engine = getattr(engine, "_engine", None)
    if deepspeed_engine is not None:
        deepspeed_engine.destroy()


def _checkpoint_name(name: str, engine: TrainEngine) -> str:
    """Name of a parameter in `TrainEngine.model_tensors`."""
    first = engine.layout.first_expert(engine.rank)
    if engine.layout.expert_layer == "deepspeed":
        from pretrain.parallel.deepspeed_native_moe import canonical_name

        canonical = canonical_name(name, first)
        if canonical is not None:
            base, expert = canonical
            return base if expert is None else slice_name(base, expert, 1)
    return slice_name(name, first, engine.layout.experts_per_rank) if is_expert(name) else name


def _full_master(parameter: nn.Parameter, zero_stage: int) -> Tensor:
    if zero_stage <= 0:
        return parameter
    from deepspeed.utils import safe_get_full_fp32_param

    full: Tensor = safe_get_full_fp32_param(parameter)
    return full
