"""The float32 weights that an engine's optimizer updates, whole, on every rank: for comparing, not
for saving.

With ZeRO and bfloat16 the module's own weights are a rounded copy of them.
"""

from __future__ import annotations

from torch import Tensor, nn

from pretrain.optim.groups import is_expert
from pretrain.parallel.engine import TrainEngine, slice_name


def master_weights(engine: TrainEngine) -> dict[str, Tensor]:
    """Every weight of this rank on CPU, float32, named as `TrainEngine.model_tensors` names them.
    Collective.

    Unlike there every rank returns everything that it holds, so that ranks that drifted apart can
    be told.
    """
    found = {}
    for name, parameter in engine.model.named_parameters():
        whole = _master(parameter, engine.layout.zero_stage)
        # A copy: on CPU this would else be the weight itself, which the next step moves.
        found[_file_name(name, engine)] = whole.detach().to("cpu", copy=True)
    return found


def release(engine: TrainEngine) -> None:
    """Let go of what DeepSpeed would hold on to for the rest of the process; the engine is of no
    use after it."""
    inner = getattr(engine, "_engine", None)
    if inner is not None:
        inner.destroy()


def _file_name(name: str, engine: TrainEngine) -> str:
    first = engine.layout.first_expert(engine.rank)
    if engine.layout.expert_layer == "deepspeed":
        from pretrain.parallel.deepspeed_native_moe import our_name

        if ours := our_name(name, first):
            return ours[0] if ours[1] is None else slice_name(ours[0], ours[1], 1)
    return slice_name(name, first, engine.layout.experts_per_rank) if is_expert(name) else name


def _master(parameter: nn.Parameter, zero_stage: int) -> Tensor:
    if zero_stage <= 0:
        return parameter
    from deepspeed.utils import safe_get_full_fp32_param

    whole: Tensor = safe_get_full_fp32_param(parameter)
    return whole
