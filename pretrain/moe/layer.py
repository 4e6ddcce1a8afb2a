"""The sparse feed-forward layer: score, choose, limit, send, compute, bring back, add the shared
experts.

MoE(x) = sum over the chosen experts of w_e(x) f_e(x) (+ shared experts). The layer sees one flat
list of valid tokens; padding never reaches it. It knows no machines: the dispatcher it is given
does.

Shapes: T tokens, D trunk width, E experts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.config.experts import BalanceConfig, MoEConfig
from pretrain.moe.bias import make_bias, moved_bias
from pretrain.moe.capacity import limit
from pretrain.moe.caption_gate import CaptionGate
from pretrain.moe.dispatch import Dispatcher, LocalDispatcher
from pretrain.moe.experts import StackedExperts, absolute_sum
from pretrain.moe.routing import Routing, Scores, choose, score_tokens
from pretrain.moe.statistics import RouterStats, router_stats
from pretrain.moe.tokens import RouterTokens


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
    """Logits of every expert for every token, in float32 whatever the activations are."""

    def __init__(self, width: int, num_experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, width))

    def forward(self, x_TD: Tensor | None = None) -> Tensor:
        """Return logits `[tokens, experts]`, float32; without tokens the sum of all absolute
        weights."""
        if x_TD is None:
            return absolute_sum(self.weight)
        with torch.autocast(x_TD.device.type, enabled=False):
            return F.linear(x_TD.float(), self.weight.float())


class MoELayer(nn.Module):
    """Routed and shared experts in place of a feed-forward network."""

    def __init__(
        self,
        width: int,
        config: MoEConfig,
        balance: BalanceConfig | None = None,
        *,
        block: int = 0,
        fused: bool = False,
        num_local_experts: int | None = None,
        dispatcher: Dispatcher | None = None,
    ) -> None:
        """Make a layer.

        Args:
            width: Of the trunk.
            config: Experts and routing.
            balance: Which biases and statistics there are; the usual ones by default.
            block: Number of the block, a part of what its random choices are drawn from.
            fused: Whether the block's text sees patches; only there may the router read the
                caption.
            num_local_experts: For expert parallelism: the layer holds only so many of the experts,
            dispatcher: and this one knows where the others are.
        """
        super().__init__()
        self.config = config
        self.balance = balance or BalanceConfig()
        self.block = block
        self.gate = Router(width, config.num_experts)
        self.caption_gate = (
            CaptionGate(width, config.num_experts)
            if config.router_input == "caption" and fused
            else None
        )
        self.bias = make_bias(config, self.balance)
        self.experts = StackedExperts(
            width,
            config.expert_width,
            num_local_experts or config.num_experts,
            # What DeepSpeed's layer has learned is judged by ours, which computes the same.
            "auto" if config.backend == "deepspeed" else config.backend,
        )
        self.shared = (
            SwiGLU(width, config.shared_experts * config.expert_width)
            if config.shared_experts
            else None
        )
        self.dispatcher: Dispatcher = dispatcher or LocalDispatcher()

    def forward(self, x_TD: Tensor, tokens: RouterTokens) -> tuple[Tensor, RouterStats]:
        """Apply the layer.

        While training, choices may be drawn and places be short; in evaluation mode every token
        gets its best experts, whatever else is in the batch.

        Args:
            x_TD: Valid tokens of the micro-batch, patches first, `[tokens, width]`.
            tokens: Where they come from.

        Returns:
            Output `[tokens, width]` and the router's statistics.
        """
        logits_TE, scored, routing = self.route(x_TD, tokens)
        y_TD = self.dispatcher.run(x_TD, routing, self.experts, self.shared)
        return y_TD, self._statistics(logits_TE, scored, routing, tokens)

    def route(self, x_TD: Tensor, tokens: RouterTokens) -> tuple[Tensor, Scores, Routing]:
        """What `forward` decides before it computes: router logits `[tokens, experts]`, scores, and
        the choice."""
        config, split = self.config, tokens.num_patch_tokens
        logits_TE = self.gate(x_TD)
        if self.caption_gate is not None and tokens.context_length:
            said = self.caption_gate(x_TD[split:], tokens)
            logits_TE = torch.cat([logits_TE[:split], logits_TE[split:] + said])
        scored = score_tokens(logits_TE, config, tokens, block=self.block, noise=self.training)
        bias_ME = None if self.bias is None else self.bias.value
        routing = choose(scored, config, tokens, bias_ME, block=self.block, noise=self.training)
        if config.capacity_factor and self.training:
            routing = limit(routing, scored.gates_TE, config, tokens, block=self.block)
        return logits_TE, scored, routing

    def _statistics(
        self, logits_TE: Tensor, scored: Scores, routing: Routing, tokens: RouterTokens
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

    def move_bias(self, choices_ME: Tensor, rate: float) -> None:
        """Move the biases after a step, by the choices of the global batch."""
        if self.bias is not None and rate:
            self.bias.value.copy_(
                moved_bias(self.bias.value, choices_ME, self.config, self.balance, rate)
            )
