"""The sparse feed-forward layer: route, send, compute, bring back, add the shared experts.

MoE(x) = sum over the chosen experts of w_e(x) f_e(x) + shared(x). The layer sees one flat list of valid
tokens; padding never reaches it. It knows no machines: the dispatcher it is given does.

Shapes: T tokens, D trunk width, E experts, K experts per token.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.config.schema import MoEConfig
from pretrain.moe.dispatch import Dispatcher, LocalDispatcher
from pretrain.moe.experts import StackedExperts
from pretrain.moe.routing import gate_scores, topk_route
from pretrain.moe.statistics import RouterStats, router_stats


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

    def forward(self, x_TD: Tensor) -> Tensor:
        """Return logits `[tokens, experts]`, float32."""
        with torch.autocast(x_TD.device.type, enabled=False):
            return F.linear(x_TD.float(), self.weight.float())


class MoELayer(nn.Module):
    """Routed and shared experts in place of a feed-forward network.

    `num_local_experts` and `dispatcher` are for expert parallelism: the layer then holds only a slice
    of the experts, and the dispatcher knows where the others are.
    """

    def __init__(
        self,
        width: int,
        config: MoEConfig,
        *,
        num_local_experts: int | None = None,
        dispatcher: Dispatcher | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.gate = Router(width, config.num_experts)
        self.experts = StackedExperts(
            width, config.expert_width, num_local_experts or config.num_experts, config.backend
        )
        self.shared = SwiGLU(width, config.shared_experts * config.expert_width) if config.shared_experts else None
        self.dispatcher: Dispatcher = dispatcher or LocalDispatcher()

    def forward(self, x_TD: Tensor, modality_T: Tensor) -> tuple[Tensor, RouterStats]:
        """Apply the layer.

        Args:
            x_TD: Valid tokens of the micro-batch, `[tokens, width]`.
            modality_T: 0 for image patches, 1 for text, int64 `[tokens]`.

        Returns:
            Output `[tokens, width]` and the router's statistics.
        """
        config = self.config
        logits_TE = self.gate(x_TD)
        scores_TE = gate_scores(logits_TE, config.score, config.temperature)
        routing = topk_route(scores_TE, config.experts_per_token, renormalise=config.renormalise)
        sent = self.dispatcher.send(x_TD, routing)
        y_ND = self.experts(sent.rows_ND, sent.rows_per_expert_L)
        y_TD = self.dispatcher.combine(y_ND, sent, routing)
        if self.shared is not None:
            y_TD = y_TD + self.shared(x_TD)
        return y_TD, router_stats(logits_TE, scores_TE, routing.expert_ids_TK, modality_T)
