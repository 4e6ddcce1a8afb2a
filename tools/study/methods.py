"""Ways of balancing, each as what it changes in a run that balances nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from data_pipeline.common.config import from_mapping, merge, to_mapping
from pretrain.config.experts import BalanceConfig, MoEConfig
from pretrain.config.schema import RunConfig

OFF = {"balance_weight": 0.0, "router_z_weight": 0.0}
"""Balancing has no other default that is not off."""

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
"""What stays the run's own, whatever a preset says."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way of balancing."""

    name: str
    words: str
    """For people."""
    balance: Mapping[str, Any] = field(default_factory=dict)
    """Settings of `balance:`; what is not named is off."""
    moe: Mapping[str, Any] = field(default_factory=dict)
    """Settings of `moe:` that the method needs."""
    preset: str = ""
    """A preset that gives both sections instead."""


def _bias(kind: str, per_modality: bool) -> dict[str, Any]:
    return {"bias": kind, "bias_rate": 1e-3, "bias_per_modality": per_modality}


METHODS = (
    Method(name="none", words="nothing"),
    Method(
        name="balance",
        words="balance loss of Switch and GShard, 1e-2",
        balance={"balance_weight": 1e-2},
    ),
    Method(
        name="importance+load",
        words="V-MoE's two losses, 0.005 each, on noisy logits",
        balance={"importance_weight": 0.005, "load_weight": 0.005},
        moe={"routing": "noisy_top_k"},
    ),
    Method(name="z", words="router z-loss alone, 1e-3", balance={"router_z_weight": 1e-3}),
    Method(
        name="entropies",
        words="LIMoE's entropies by modality, 0.01 each",
        balance={
            "local_entropy_weight": {"image": 0.0, "text": 0.01},
            "global_entropy_weight": {"image": 0.01, "text": 0.01},
        },
    ),
    Method(name="sign", words="loss-free bias by a fixed step", balance=_bias("sign", False)),
    Method(
        name="sign-by-modality",
        words="the same, one bias for patches and one for text",
        balance=_bias("sign", True),
    ),
    Method(
        name="zscore",
        words="loss-free bias by how far an expert is off",
        balance=_bias("zscore", False),
    ),
    Method(name="zscore-by-modality", words="the same by modality", balance=_bias("zscore", True)),
    *(
        Method(
            name=f"preset-{name}", words=f"routing and balancing of the preset {name}", preset=name
        )
        for name in ("switch", "vmoe", "limoe", "vl_moe", "deepseek", "ours")
    ),
)


def balanced(
    base: RunConfig, method: Method, presets: Mapping[str, Mapping[str, Any]]
) -> RunConfig:
    """A run with another way of balancing and the same topology.

    Args:
        base: The run.
        method: What to change.
        presets: The sections `moe` and `balance` of every preset.
    """
    given = (
        presets[method.preset] if method.preset else {"moe": method.moe, "balance": method.balance}
    )
    kept = to_mapping(base.moe)
    moe = from_mapping(
        MoEConfig,
        merge(kept, {**given["moe"], **{key: kept[key] for key in TOPOLOGY}}),
        source=f"{method.name}: moe",
    )
    balance = from_mapping(
        BalanceConfig, OFF | dict(given["balance"]), source=f"{method.name}: balance"
    )
    return replace(base, moe=moe, balance=balance)
