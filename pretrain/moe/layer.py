"""The sparse feed-forward layer: router, expert selection, capacity limit, dispatch, experts,
combination, shared experts.

MoE(x) = sum over the selected experts of w_e(x) f_e(x) (+ shared experts). The input is one flat
list of valid tokens; padding never reaches the layer. The dispatcher communicates
with other processes.

Shapes: T tokens, D trunk width, E experts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.config.experts import BalanceConfig, MoEConfig
from pretrain.moe.bias import build_expert_bias, updated_bias
from pretrain.moe.capacity import apply_capacity
from pretrain.moe.caption_gate import CaptionGate
from pretrain.moe.dispatch import Dispatcher, LocalDispatcher
from pretrain.moe.experts import StackedExperts, l1_norm
from pretrain.moe.routing import ReplaceSelection, Routing, Scores, assign_experts, score_tokens
from pretrain.moe.statistics import RouterStats, router_stats
from pretrain.moe.tokens import TokenBatch


class SwiGLU(nn.Module):
    """A gated feed-forward network without biases (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(2 * hidden, width))
        self.down = nn.Parameter(torch.empty(width, hidden))

    def forward(self, x_TD: Tensor) -> Tensor:
        """Map `[tokens, width]` to the same shape."""
        gate_TF, up_TF = F.linear(x_TD, self.gate_up.to(x_TD.dtype)).chunk(2, dim=-1)
        return F.linear(F.silu(gate_TF) * up_TF, self.down.to(x_TD.dtype))


class Router(nn.Module):
    """Linear map from tokens to expert logits, in float32 for any dtype of the activations."""

    def __init__(self, width: int, num_experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, width))

    def forward(self, x_TD: Tensor | None = None) -> Tensor:
        """Return logits `[tokens, experts]`, float32; without tokens, the sum of all absolute
        weights, a float32 scalar."""
        if x_TD is None:
            return l1_norm(self.weight)
        with torch.autocast(x_TD.device.type, enabled=False):
            return F.linear(x_TD.float(), self.weight.float())


class MoELayer(nn.Module):
    """Routed and shared experts in place of a dense feed-forward network."""

    def __init__(
        self,
        width: int,
        config: MoEConfig,
        balance: BalanceConfig | None = None,
        *,
        block_index: int = 0,
        fused: bool = False,
        num_local_experts: int | None = None,
        dispatcher: Dispatcher | None = None,
    ) -> None:
        """Create a layer with uninitialized parameters.

        Args:
            width: Width of the trunk.
            config: Experts and routing.
            balance: Selects the biases and statistics; None means the default configuration.
            block_index: Index of the block; part of the seed of its random routing decisions.
            fused: Whether text attends to patches in this block; only there does
                `router_input: caption` apply.
            num_local_experts: With expert parallelism, the number of experts that this rank holds.
            dispatcher: With expert parallelism, exchanges tokens with the ranks that hold the other
                experts.
        """
        super().__init__()
        self.config = config
        self.balance = balance or BalanceConfig()
        self.block_index = block_index

        self.gate = Router(width, config.num_experts)
        self.caption_gate = None
        if config.router_input == "caption" and fused:
            self.caption_gate = CaptionGate(width, config.num_experts)
        self.bias = build_expert_bias(config, self.balance)

        self.experts = StackedExperts(
            width,
            config.expert_width,
            num_local_experts or config.num_experts,
            config.backend,
        )
        self.shared = None
        if config.shared_experts:
            self.shared = SwiGLU(width, config.shared_experts * config.expert_width)
        self.dispatcher: Dispatcher = dispatcher or LocalDispatcher()
        self.replace_selection: ReplaceSelection | None = None

    def forward(self, x_TD: Tensor, tokens: TokenBatch) -> tuple[Tensor, RouterStats]:
        """Apply the layer.

        During training, routing may be random and the capacity limited. In evaluation mode every
        token is processed by its best experts, independently of the rest of the batch.

        Args:
            x_TD: Valid tokens of the micro-batch, patches first, `[tokens, width]`.
            tokens: Metadata of the tokens.

        Returns:
            Output `[tokens, width]` and the router's statistics.
        """
        logits_TE, scored, routing = self.route(x_TD, tokens)
        y_TD = self.dispatcher.run(x_TD, routing, self.experts, self.shared)
        return y_TD, self._statistics(logits_TE, scored, routing, tokens)

    def route(self, x_TD: Tensor, tokens: TokenBatch) -> tuple[Tensor, Scores, Routing]:
        """Compute the router logits `[tokens, experts]`, the gate scores and the assignments."""
        config, split = self.config, tokens.num_patch_tokens
        logits_TE = self.gate(x_TD)
        if self.caption_gate is not None and tokens.context_length:
            caption_logits_TE = self.caption_gate(x_TD[split:], tokens)
            logits_TE = torch.cat([logits_TE[:split], logits_TE[split:] + caption_logits_TE])

        scored = score_tokens(
            logits_TE, config, tokens, block_index=self.block_index, noise=self.training
        )
        bias_ME = None if self.bias is None else self.bias.value
        routing = assign_experts(
            scored,
            config,
            tokens,
            bias_ME,
            block_index=self.block_index,
            noise=self.training,
            replace_selection=self.replace_selection,
        )
        if config.uses_capacity and self.training:
            routing = apply_capacity(
                routing, scored.gates_TE, config, tokens, block_index=self.block_index
            )
        return logits_TE, scored, routing

    def _statistics(
        self, logits_TE: Tensor, scored: Scores, routing: Routing, tokens: TokenBatch
    ) -> RouterStats:
        return router_stats(
            logits_TE,
            scored,
            routing,
            tokens,
            self.config,
            load=self.training and self.balance.load_weight > 0,
            expert_l1=self.experts() if self.training and self.balance.expert_l1_weight else None,
            router_l1=self.gate() if self.training and self.balance.router_l1_weight else None,
        )

    def update_bias(self, assignments_ME: Tensor, rate: float) -> None:
        """Update the expert biases after a step, given the assignments of the global batch."""
        if self.bias is not None and rate:
            self.bias.value.copy_(
                updated_bias(self.bias.value, assignments_ME, self.config, self.balance, rate)
            )
