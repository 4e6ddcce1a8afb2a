"""What DeepSpeed's own MoE layer (`moe.backend: deepspeed`) cannot do, said before a run starts."""

from __future__ import annotations

from collections.abc import Iterator

from pretrain.config.schema import RunConfig


def deepspeed_layer_problems(run: RunConfig, zero_stage: int | None) -> Iterator[str]:
    """Every setting of a run that DeepSpeed's layer does not know; none for runs with our layer.

    Args:
        run: The run.
        zero_stage: Of its DeepSpeed profile; None where it is not known.
    """
    moe, balance = run.moe, run.balance
    if moe.backend != "deepspeed":
        return
    facts = (
        (
            run.parallel.engine == "plain",
            "parallel.engine",
            run.parallel.engine,
            "parallel.engine=deepspeed",
        ),
        (
            zero_stage == 3,
            "parallel.deepspeed",
            f"{run.parallel.deepspeed} (ZeRO stage 3)",
            "a profile with ZeRO stage 0, 1 or 2",
        ),
        (moe.score_func != "softmax", "moe.score_func", moe.score_func, "moe.score_func=softmax"),
        (moe.temperature != 1, "moe.temperature", moe.temperature, "moe.temperature=1"),
        (
            not moe.norm_topk_prob and moe.top_k > 1,
            "moe.norm_topk_prob",
            "false",
            "moe.norm_topk_prob=true",
        ),
        (
            moe.router_input != "token",
            "moe.router_input",
            moe.router_input,
            "moe.router_input=token",
        ),
        (moe.routing != "top_k", "moe.routing", moe.routing, "moe.routing=top_k"),
        # It has a capacity, but one of each rank's micro-batch: who is left out would depend on the
        # layout.
        (
            moe.capacity_factor != 0,
            "moe.capacity_factor",
            moe.capacity_factor,
            "moe.capacity_factor=0",
        ),
        (moe.pools != "shared", "moe.pools", moe.pools, "moe.pools=shared"),
        (balance.bias != "none", "balance.bias", balance.bias, "balance.bias=none"),
        (
            balance.expert_l1_weight != 0,
            "balance.expert_l1_weight",
            balance.expert_l1_weight,
            "balance.expert_l1_weight=0",
        ),
        (
            balance.router_l1_weight != 0,
            "balance.router_l1_weight",
            balance.router_l1_weight,
            "balance.router_l1_weight=0",
        ),
    )
    for refused, name, value, instead in facts:
        if refused:
            yield (
                f"{name} is {value}, which DeepSpeed's own MoE layer (moe.backend deepspeed) does not know; use "
                f"{instead}, or another moe.backend"
            )
