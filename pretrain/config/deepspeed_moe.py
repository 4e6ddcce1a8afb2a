"""Settings that DeepSpeed's MoE layer (`moe.backend: deepspeed`) does not support."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from pretrain.config.schema import RunConfig


class _Restriction(NamedTuple):
    """A setting that DeepSpeed's layer supports for some values only."""

    is_violated: bool
    name: str
    value: Any
    alternative: str
    """Supported setting that the error message suggests."""


def deepspeed_moe_problems(run: RunConfig, zero_stage: int | None) -> Iterator[str]:
    """One message for every setting of the run that DeepSpeed's MoE layer does not support; none
    for other backends.

    Args:
        run: The run.
        zero_stage: ZeRO stage of its DeepSpeed profile; None if unknown.
    """
    if run.moe.backend != "deepspeed":
        return
    for restriction in _restrictions(run, zero_stage):
        if restriction.is_violated:
            yield (
                f"{restriction.name} is {restriction.value}, which DeepSpeed's MoE layer "
                f"(moe.backend deepspeed) does not support; use {restriction.alternative}, or "
                f"another moe.backend"
            )


def _restrictions(run: RunConfig, zero_stage: int | None) -> Iterator[_Restriction]:
    engine, profile = run.parallel.engine, run.parallel.deepspeed
    yield _Restriction(engine == "plain", "parallel.engine", engine, "parallel.engine=deepspeed")
    yield _Restriction(
        zero_stage == 3,
        "parallel.deepspeed",
        f"{profile} (ZeRO stage 3)",
        "a profile with ZeRO stage 0, 1 or 2",
    )

    moe = run.moe
    yield _required("moe.score_func", moe.score_func, "softmax")
    yield _required("moe.temperature", moe.temperature, 1)
    yield _Restriction(
        not moe.norm_topk_prob and moe.top_k > 1,
        "moe.norm_topk_prob",
        "false",
        "moe.norm_topk_prob=true",
    )
    yield _required("moe.router_input", moe.router_input, "token")
    yield _required("moe.routing", moe.routing, "top_k")
    # DeepSpeed's layer has a capacity, but per micro-batch of a rank: the dropped assignments would
    # depend on the parallel layout.
    yield _required("moe.capacity_factor", moe.capacity_factor, 0)
    yield _required("moe.pools", moe.pools, "shared")

    balance = run.balance
    yield _required("balance.bias", balance.bias, "none")
    yield _required("balance.expert_l1_weight", balance.expert_l1_weight, 0)
    yield _required("balance.router_l1_weight", balance.router_l1_weight, 0)


def _required(name: str, value: Any, required: Any) -> _Restriction:
    return _Restriction(value != required, name, value, f"{name}={required}")
