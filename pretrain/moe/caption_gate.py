"""A router's second opinion for text in fused blocks: what the caption so far says.

Every expert has a query that attends to the caption's tokens, and a vector that reads what it
found; the result is added to the router's logits of a text token. A token attends to itself and the
tokens before it, so a caption still cannot see its own future, and patches get no term, so an image
still does not depend on its caption. The cost is linear in the tokens: attention by one fixed query
over a growing caption is a running sum.

Shapes: T text tokens, D trunk width, E experts, B pairs, S text positions.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.moe.tokens import RouterTokens

SCORE_CEILING = 10.0
"""Attention scores stay in -10..10 (tanh), so that their exponentials can be summed plainly: no sum
of a caption comes near the limits of float32, and none is lost in another."""


class CaptionGate(nn.Module):
    """Logits that a caption's earlier tokens add."""

    def __init__(self, width: int, num_experts: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.empty(num_experts, width))
        self.value = nn.Parameter(torch.empty(num_experts, width))

    def forward(self, text_TD: Tensor, tokens: RouterTokens) -> Tensor:
        """Return `[text tokens, experts]`, float32."""
        with torch.autocast(text_TD.device.type, enabled=False):
            x_TD = text_TD.float()
            raw_TE = F.linear(x_TD, self.query.float()) / math.sqrt(x_TD.shape[1])
            weight_TE = torch.exp(SCORE_CEILING * torch.tanh(raw_TE / SCORE_CEILING))
            found_TE = F.linear(x_TD, self.value.float())
            both = torch.cat([weight_TE, weight_TE * found_TE], dim=1)
            padded = both.new_zeros(tokens.num_pairs * tokens.context_length, both.shape[1])
            padded = padded.index_copy(0, tokens.text_positions, both)
            sums = (
                padded.view(tokens.num_pairs, tokens.context_length, both.shape[1])
                .cumsum(dim=1)
                .flatten(0, 1)
            )
            weights, values = sums.index_select(0, tokens.text_positions).chunk(2, dim=1)
            return values / weights
