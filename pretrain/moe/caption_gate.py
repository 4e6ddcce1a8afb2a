"""Caption-conditioned router logits for text tokens in fused blocks.

Each expert e has a query q_e and a value vector v_e. At text position t of a caption with hidden
states x_1 ... x_S, the gate adds to the router logit of expert e

    sum_{s <= t} a_es <v_e, x_s>,  a_e = softmax_{s <= t}(c tanh(<q_e, x_s> / (c sqrt(D)))),  c = 10

Attention is causal (positions s <= t only), so a caption token does not depend on later tokens.
Patches get no term, so an image embedding does not depend on the caption. The query does not depend
on t, so each softmax is a ratio of running sums, and the cost is linear in the number of tokens.

Source: derived for this model; no published router is known to compute exactly this. The starting
point is a gate that attends over the caption's tokens, w_k = softmax_k(sum_i alpha_ki t_i); here it
is restricted to causal positions and to text tokens, and its logits are capped with tanh.

Shapes: T text tokens, D trunk width, E experts, B pairs, S text positions.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.moe.tokens import TokenBatch

SCORE_CAP = 10.0
"""Attention logits are soft-capped to -10..10 (tanh), so that running sums of their exponentials
neither overflow nor underflow in float32 without subtracting a maximum."""


class CaptionGate(nn.Module):
    """Router logits computed from a caption's tokens up to the current one."""

    def __init__(self, width: int, num_experts: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.empty(num_experts, width))
        self.value = nn.Parameter(torch.empty(num_experts, width))

    def forward(self, text_TD: Tensor, tokens: TokenBatch) -> Tensor:
        """Return logits to add for the text tokens, float32 `[text tokens, experts]`."""
        with torch.autocast(text_TD.device.type, enabled=False):
            x_TD = text_TD.float()
            raw_TE = F.linear(x_TD, self.query.float()) / math.sqrt(x_TD.shape[1])
            weight_TE = torch.exp(SCORE_CAP * torch.tanh(raw_TE / SCORE_CAP))
            value_TE = F.linear(x_TD, self.value.float())

            sums = _running_sums(torch.cat([weight_TE, weight_TE * value_TE], dim=1), tokens)
            weight_sum_TE, value_sum_TE = sums.chunk(2, dim=1)
            return value_sum_TE / weight_sum_TE


def _running_sums(x_TX: Tensor, tokens: TokenBatch) -> Tensor:
    """Cumulative sum of every column X over the positions of each caption, `[text tokens, X]`."""
    columns = x_TX.shape[1]
    padded = x_TX.new_zeros(tokens.num_pairs * tokens.context_length, columns)
    padded = padded.index_copy(0, tokens.text_positions, x_TX)
    sums = padded.view(tokens.num_pairs, tokens.context_length, columns).cumsum(dim=1)
    return sums.flatten(0, 1).index_select(0, tokens.text_positions)
