"""DeepSpeed's own MoE layer in our trunk (`moe.backend: deepspeed`): a peer to measure against.

Choosing, sending and computing are `deepspeed.moe.layer.MoE`'s, without dropping. Around it is what
makes its runs comparable with ours: the same first values, the shared expert, statistics and
balancing terms of the global batch from its router's logits and choices, and checkpoints in our
names, so that a run is judged like any other. Its own balance loss is left alone: it is that of one
rank's tokens, and counts only first choices where there are two.

What it cannot do is told by `pretrain.config.deepspeed_layer`.
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
from pretrain.model.block import MakeMoELayer
from pretrain.model.init import fill_parameter
from pretrain.moe.layer import MoELayer, SwiGLU
from pretrain.moe.routing import Routing, count_choices, score_tokens
from pretrain.moe.statistics import RouterStats, router_stats
from pretrain.moe.tokens import RouterTokens
from pretrain.parallel.layout import Layout


class Expert(nn.Module):
    """One SwiGLU expert, its weights as a slice of our stacks: `[1, out, in]`."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.empty(1, hidden, width))
        self.w2 = nn.Parameter(torch.empty(1, width, hidden))
        self.w3 = nn.Parameter(torch.empty(1, hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        """Map the last dimension from `width` to `width`."""
        w1, w2, w3 = (weight[0].to(x.dtype) for weight in (self.w1, self.w2, self.w3))
        return F.linear(F.silu(F.linear(x, w1)) * F.linear(x, w3), w2)


def native_layer(
    width: int, hidden: int, num_experts: int, k: int, *, expert_parallel_size: int = 1
) -> MoE:
    """`deepspeed.moe.layer.MoE` that drops nothing and draws nothing, experts with undefined
    weights."""
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
    """DeepSpeed's layer with the face of ours."""

    def __init__(
        self,
        width: int,
        config: MoEConfig,
        balance: BalanceConfig,
        *,
        block: int,
        expert_parallel_size: int = 1,
    ) -> None:
        nn.Module.__init__(self)  # not ours: that would make our router and experts as well
        self.config, self.balance, self.block = config, balance, block
        self.caption_gate = self.bias = None
        self.native = native_layer(
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

    def forward(self, x_TD: Tensor, tokens: RouterTokens) -> tuple[Tensor, RouterStats]:
        """See `MoELayer.forward`."""
        gate = self.native.deepspeed_moe.gate
        answers: list[tuple[Any, ...]] = []
        hook = gate.register_forward_hook(lambda _module, _inputs, answer: answers.append(answer))
        try:
            # A rank without a token must still take part, in the exchanges of the backward pass
            # too; and DeepSpeed cannot reshape nothing.
            rows_TD = x_TD if len(x_TD) else F.pad(x_TD, (0, 0, 0, 1))
            y_TD = self.native(rows_TD)[0][: len(x_TD)]
        finally:
            hook.remove()
        if self.shared is not None:
            y_TD = y_TD + self.shared(x_TD)
        # The logits once more, since the gate keeps its own to itself: a small product, from which
        # all statistics and terms follow, with gradient.
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE = F.linear(x_TD.float(), gate.wg.weight.float())
        scored = score_tokens(logits_TE, self.config, tokens, block=self.block, noise=False)
        return y_TD, router_stats(
            logits_TE, scored, self._routing(answers[-1], tokens), tokens, self.config
        )

    def _routing(self, answer: tuple[Any, ...], tokens: RouterTokens) -> Routing:
        """The gate's choices in our order. It answers: balance loss, capacity, experts, ids [k, T],
        places [k, T], weights [k, T], choices by expert."""
        k, num_experts = self.config.top_k, self.config.num_experts
        count = tokens.num_patch_tokens + len(tokens.text_positions)
        ids_N = answer[3].t()[:count].flatten().to(torch.int64)
        weights_N = answer[5].t()[:count].flatten()
        choices_ME = count_choices(ids_N, tokens.num_patch_tokens * k, num_experts)
        return Routing(weights_N, ids_N, choices_ME, choices_ME, k)


def native_layers(layout: Layout) -> MakeMoELayer:
    """A maker of such layers. The process group must be there."""
    group = f"ep_size_{layout.expert_parallel_size}"
    if (
        group not in groups._get_expert_parallel_group_dict()
    ):  # DeepSpeed would make it too, and print
        groups._create_expert_and_data_parallel(layout.expert_parallel_size)

    def make(
        width: int, config: MoEConfig, balance: BalanceConfig, *, block: int, fused: bool
    ) -> MoELayer:
        return DeepSpeedNativeMoELayer(
            width, config, balance, block=block, expert_parallel_size=layout.expert_parallel_size
        )

    return make


_EXPERT = re.compile(r"(.+)\.native\.deepspeed_moe\.experts\.deepspeed_experts\.(\d+)\.(w[123])")
_GATE = re.compile(r"(.+)\.native\.deepspeed_moe\.gate\.wg\.weight")


def our_name(name: str, first_expert: int) -> tuple[str, int | None] | None:
    """What a parameter of DeepSpeed's layer is called in ours, and the expert's global number.

    Args:
        name: In the model with DeepSpeed's layers.
        first_expert: Global number of the first expert that this rank holds.

    Returns:
        None for a parameter that is not DeepSpeed's; without a number for the router.
    """
    if found := _EXPERT.fullmatch(name):
        return f"{found[1]}.experts.{found[3]}", first_expert + int(found[2])
    if found := _GATE.fullmatch(name):
        return f"{found[1]}.gate.weight", None
    return None


def fill_as_ours(model: nn.Module, run: RunConfig, first_expert: int) -> None:
    """Give DeepSpeed's layers the first values that ours would have; its own are copies of one
    expert."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ours := our_name(name, first_expert):
                fill_parameter(ours[0], parameter, run.seed, run.model.num_layers, ours[1] or 0)
