"""Load-balancing methods, each as its changes to a run without balancing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from data_pipeline.common.config import from_mapping, merge, to_mapping
from pretrain.config.experts import BalanceConfig, MoEConfig
from pretrain.config.schema import RunConfig

OFF = {"balance_weight": 0.0, "router_z_weight": 0.0}
"""Turns balancing off: all other defaults of `BalanceConfig` are off."""

TOPOLOGY = (
    "num_experts",
    "top_k",
    "expert_width",
    "shared_experts",
    "start",
    "every",
    "stop",
    "backend",
)
"""Settings of `moe` that are always those of the run, never of a preset."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """One load-balancing method."""

    name: str
    description: str
    """For the help text."""
    balance: Mapping[str, Any] = field(default_factory=dict)
    """Settings of `balance`; everything else is off."""
    moe: Mapping[str, Any] = field(default_factory=dict)
    """Settings of `moe` that the method needs."""
    preset: str = ""
    """Preset whose sections `moe` and `balance` are used instead."""


def _bias(kind: str, per_modality: bool) -> dict[str, Any]:
    return {"bias": kind, "bias_rate": 1e-3, "bias_per_modality": per_modality}


METHODS = (
    Method(name="none", description="no balancing"),
    Method(
        name="balance",
        description="balance loss of Switch and GShard, 1e-2",
        balance={"balance_weight": 1e-2},
    ),
    Method(
        name="importance+load",
        description="V-MoE's two losses, 0.005 each, with noisy top-k routing",
        balance={"importance_weight": 0.005, "load_weight": 0.005},
        moe={"routing": "noisy_top_k"},
    ),
    Method(name="z", description="router z-loss only, 1e-3", balance={"router_z_weight": 1e-3}),
    Method(
        name="entropies",
        description="LIMoE's entropy losses per modality, 0.01 each",
        balance={
            "local_entropy_weight": {"image": 0.0, "text": 0.01},
            "global_entropy_weight": {"image": 0.01, "text": 0.01},
        },
    ),
    Method(
        name="sign",
        description="loss-free bias, updated by the sign of the load error",
        balance=_bias("sign", False),
    ),
    Method(
        name="sign-by-modality",
        description="the same with separate biases for patches and text",
        balance=_bias("sign", True),
    ),
    Method(
        name="zscore",
        description="loss-free bias, updated by the z-score of the load",
        balance=_bias("zscore", False),
    ),
    Method(
        name="zscore-by-modality",
        description="the same with separate biases for patches and text",
        balance=_bias("zscore", True),
    ),
    *(
        Method(
            name=f"preset-{name}",
            description=f"routing and balancing of the preset {name}",
            preset=name,
        )
        for name in ("switch", "vmoe", "limoe", "vl_moe", "deepseek", "ours")
    ),
)


def apply_method(
    base: RunConfig, method: Method, presets: Mapping[str, Mapping[str, Any]]
) -> RunConfig:
    """A run with another balancing method and the same topology.

    Args:
        base: The run.
        method: The method.
        presets: The sections `moe` and `balance` of every preset, by name.
    """
    sections: Mapping[str, Any] = {"moe": method.moe, "balance": method.balance}
    if method.preset:
        sections = presets[method.preset]

    base_moe = to_mapping(base.moe)
    topology = {key: base_moe[key] for key in TOPOLOGY}
    moe = from_mapping(
        MoEConfig,
        merge(base_moe, {**sections["moe"], **topology}),
        source=f"{method.name}: moe",
    )
    balance = from_mapping(
        BalanceConfig, OFF | dict(sections["balance"]), source=f"{method.name}: balance"
    )
    return replace(base, moe=moe, balance=balance)
