"""DeepSpeed's MoE layer in our model (`moe.backend: deepspeed`), as a baseline for comparison.

Routing, dispatch and expert computation are those of `deepspeed.moe.layer.MoE`, without dropping
tokens. The rest matches `MoELayer`, so that runs are comparable: initial weights, shared experts,
statistics and balancing losses over the global batch (computed from the logits and assignments of
DeepSpeed's gate), and parameter names in checkpoints. DeepSpeed's own balancing loss is not used:
it covers the tokens of one rank only, and with top-2 routing it ignores each token's second expert.

Settings that this layer does not support are rejected by `pretrain.config.deepspeed_moe`.
"""

from __future__ import annotations

import re
from typing import Any

import torch
import torch.nn.functional as F
from deepspeed.moe.layer import MoE
from deepspeed.utils import groups
from torch import Tensor, nn

from pretrain.config.experts import BalanceConfig, MoEConfig
from pretrain.config.schema import RunConfig
from pretrain.model.block import MoELayerFactory
from pretrain.model.init import initialize_parameter
from pretrain.moe.layer import MoELayer, SwiGLU
from pretrain.moe.routing import Routing, count_assignments, score_tokens
from pretrain.moe.statistics import RouterStats, router_stats
from pretrain.moe.token_metadata import TokenMetadata
from pretrain.parallel.layout import Layout


class Expert(nn.Module):
    """One SwiGLU expert; weights are `[1, out, in]`, one slice of `StackedExperts`."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.empty(1, hidden, width))
        self.w2 = nn.Parameter(torch.empty(1, width, hidden))
        self.w3 = nn.Parameter(torch.empty(1, hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        """Map the last dimension from `width` to `width`."""
        w1, w2, w3 = (weight[0].to(x.dtype) for weight in (self.w1, self.w2, self.w3))
        return F.linear(F.silu(F.linear(x, w1)) * F.linear(x, w3), w2)


def make_native_moe(
    width: int, hidden: int, num_experts: int, k: int, *, expert_parallel_size: int = 1
) -> MoE:
    """`deepspeed.moe.layer.MoE` without dropping or random routing; experts uninitialized."""
    return MoE(
        width,
        Expert(width, hidden),
        num_experts=num_experts,
        ep_size=expert_parallel_size,
        k=k,
        min_capacity=0,
        drop_tokens=False,
        use_rts=False,
        top2_2nd_expert_sampling=False,
    )


class DeepSpeedNativeMoELayer(MoELayer):
    """DeepSpeed's MoE layer behind the interface of `MoELayer`."""

    def __init__(
        self,
        width: int,
        config: MoEConfig,
        balance: BalanceConfig,
        *,
        block_index: int,
        expert_parallel_size: int = 1,
    ) -> None:
        # `MoELayer.__init__` is skipped: it would create a second router and second experts.
        nn.Module.__init__(self)
        self.config, self.balance, self.block_index = config, balance, block_index
        self.caption_gate = self.bias = None
        self.native = make_native_moe(
            width,
            config.expert_width,
            config.num_experts,
            config.top_k,
            expert_parallel_size=expert_parallel_size,
        )
        self.shared = (
            SwiGLU(width, config.shared_experts * config.expert_width)
            if config.shared_experts
            else None
        )

    def forward(self, x_TD: Tensor, tokens: TokenMetadata) -> tuple[Tensor, RouterStats]:
        """See `MoELayer.forward`."""
        gate = self.native.deepspeed_moe.gate
        gate_outputs: list[tuple[Any, ...]] = []
        hook = gate.register_forward_hook(
            lambda _module, _inputs, output: gate_outputs.append(output)
        )
        try:
            # A rank without tokens must still take part in all collectives, backward included, and
            # DeepSpeed cannot reshape an empty tensor: it gets one row of zeros.
            rows_TD = x_TD if len(x_TD) else F.pad(x_TD, (0, 0, 0, 1))
            y_TD = self.native(rows_TD)[0][: len(x_TD)]
        finally:
            hook.remove()
        if self.shared is not None:
            y_TD = y_TD + self.shared(x_TD)

        # The gate does not return its logits. They are recomputed (a small matmul), with gradient
        # for the balancing losses.
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE = F.linear(x_TD.float(), gate.wg.weight.float())
        scores = score_tokens(
            logits_TE, self.config, tokens, block_index=self.block_index, noise=False
        )
        routing = self._routing(gate_outputs[-1], tokens)
        return y_TD, router_stats(logits_TE, scores, routing, tokens, self.config)

    def _routing(self, gate_output: tuple[Any, ...], tokens: TokenMetadata) -> Routing:
        """The gate's assignments as a `Routing`.

        `gate_output` is: balancing loss, capacity, number of experts, expert ids `[k, T]`, slots
        `[k, T]`, weights `[k, T]`, assignments by expert.
        """
        k, num_experts = self.config.top_k, self.config.num_experts
        num_tokens = tokens.num_patch_tokens + len(tokens.text_positions)
        ids_N = gate_output[3].t()[:num_tokens].flatten().to(torch.int64)
        weights_N = gate_output[5].t()[:num_tokens].flatten()
        assignments_ME = count_assignments(ids_N, tokens.num_patch_tokens * k, num_experts)
        return Routing(weights_N, ids_N, assignments_ME, assignments_ME, k)


def native_layer_factory(layout: Layout) -> MoELayerFactory:
    """A factory of `DeepSpeedNativeMoELayer`s. Requires an initialized process group."""
    group = f"ep_size_{layout.expert_parallel_size}"
    # DeepSpeed would create the groups later, but also print to stdout.
    if group not in groups._get_expert_parallel_group_dict():
        groups._create_expert_and_data_parallel(layout.expert_parallel_size)

    def make(
        width: int, config: MoEConfig, balance: BalanceConfig, *, block_index: int, fused: bool
    ) -> MoELayer:
        return DeepSpeedNativeMoELayer(
            width,
            config,
            balance,
            block_index=block_index,
            expert_parallel_size=layout.expert_parallel_size,
        )

    return make


_EXPERT = re.compile(r"(.+)\.native\.deepspeed_moe\.experts\.deepspeed_experts\.(\d+)\.(w[123])")
_GATE = re.compile(r"(.+)\.native\.deepspeed_moe\.gate\.wg\.weight")


def canonical_name(name: str, first_expert: int) -> tuple[str, int | None] | None:
    """Name of a parameter of DeepSpeed's layer in `MoELayer`, and its global expert index.

    Args:
        name: Name in the model with DeepSpeed's layers.
        first_expert: Global index of the first expert that this rank holds.

    Returns:
        (name, expert index), with index None for the router's weight; None for a parameter outside
        DeepSpeed's layers.
    """
    if match := _EXPERT.fullmatch(name):
        return f"{match[1]}.experts.{match[3]}", first_expert + int(match[2])
    if match := _GATE.fullmatch(name):
        return f"{match[1]}.gate.weight", None
    return None


def init_like_moe_layer(model: nn.Module, run: RunConfig, first_expert: int) -> None:
    """Initialize DeepSpeed's layers with the values that `MoELayer` would have.

    DeepSpeed itself copies one expert to all others.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            canonical = canonical_name(name, first_expert)
            if canonical is None:
                continue
            base, expert = canonical
            initialize_parameter(base, parameter, run.seed, run.model.num_layers, expert or 0)
