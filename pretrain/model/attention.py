"""Self-attention over one flat list of tokens: all patches, then all valid text tokens.

Patches attend to the patches of their image. Text attends to earlier text of its caption and, in a
fused block, also to all patches of its image. Patches never attend to text, so an image embedding
does not depend on a caption.

Text is padded on the right for the attention kernel only. Attention is causal there, so no valid
query attends to padding, and no padding mask is needed.

Shapes: B pairs, P patches, S text positions, T tokens = B x P + valid text, H heads, Q head width,
R = Q / 2 rotary frequencies.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.model.layers import Linear, RMSNorm, apply_rotary
from pretrain.moe.tokens import TokenBatch


class Attention(nn.Module):
    """Multi-head attention with QK-norm and rotary positions, fused or block-diagonal."""

    def __init__(self, width: int, num_heads: int, *, fused: bool) -> None:
        super().__init__()
        self.num_heads, self.fused = num_heads, fused
        self.qkv = Linear(width, 3 * width)
        self.query_norm = RMSNorm(width // num_heads)
        self.key_norm = RMSNorm(width // num_heads)
        self.out = Linear(width, width)

    def forward(self, x_TD: Tensor, tokens: TokenBatch) -> Tensor:
        """Return `[tokens, width]`."""
        num_tokens, width = x_TD.shape
        split = tokens.num_patch_tokens
        qkv_T3HQ = self.qkv(x_TD).view(num_tokens, 3, self.num_heads, width // self.num_heads)
        q, k, v = qkv_T3HQ.unbind(1)
        assert tokens.cos_T1R is not None and tokens.sin_T1R is not None
        q = apply_rotary(self.query_norm(q), tokens.cos_T1R, tokens.sin_T1R)
        k = apply_rotary(self.key_norm(k), tokens.cos_T1R, tokens.sin_T1R)

        outputs = []
        patch_keys = patch_values = None
        if split:
            patch_queries, patch_keys, patch_values = (
                _split_pairs(t[:split], tokens) for t in (q, k, v)
            )
            y_BHPQ = F.scaled_dot_product_attention(patch_queries, patch_keys, patch_values)
            outputs.append(y_BHPQ.transpose(1, 2).reshape(split, width))

        if tokens.context_length:
            text_queries, text_keys, text_values = (_pad_text(t[split:], tokens) for t in (q, k, v))
            if self.fused and patch_keys is not None and patch_values is not None:
                text_keys = torch.cat([patch_keys, text_keys], dim=2)
                text_values = torch.cat([patch_values, text_values], dim=2)
            y_BHSQ = _causal_attention(text_queries, text_keys, text_values)
            padded = y_BHSQ.transpose(1, 2).reshape(tokens.num_pairs * tokens.context_length, width)
            outputs.append(padded.index_select(0, tokens.text_positions))

        output_TD: Tensor = self.out(torch.cat(outputs) if len(outputs) > 1 else outputs[0])
        return output_TD


def _split_pairs(x_THQ: Tensor, tokens: TokenBatch) -> Tensor:
    """Patch tokens `[B x P, heads, q]` -> `[B, heads, P, q]`."""
    return x_THQ.view(tokens.num_pairs, tokens.num_patches, *x_THQ.shape[1:]).transpose(1, 2)


def _pad_text(x_THQ: Tensor, tokens: TokenBatch) -> Tensor:
    """Valid text tokens `[text tokens, heads, q]` -> `[B, heads, S, q]`, zeros at the padding."""
    padded = x_THQ.new_zeros(tokens.num_pairs * tokens.context_length, *x_THQ.shape[1:])
    padded = padded.index_copy(0, tokens.text_positions, x_THQ)
    return padded.view(tokens.num_pairs, tokens.context_length, *x_THQ.shape[1:]).transpose(1, 2)


def _causal_attention(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Causal attention aligned lower-right: the last query attends to all keys."""
    num_queries, num_keys = queries.shape[2], keys.shape[2]
    if num_queries == num_keys:
        return F.scaled_dot_product_attention(queries, keys, values, is_causal=True)
    if queries.is_cuda:
        # Imported late: it imports torch's compiler, which takes a second.
        from torch.nn.attention.bias import causal_lower_right

        bias = causal_lower_right(num_queries, num_keys)
        return F.scaled_dot_product_attention(queries, keys, values, attn_mask=bias)

    # The CPU kernel does not support lower-right alignment; all pairs share one [S, P + S] mask.
    mask = torch.ones(num_queries, num_keys, dtype=torch.bool).tril(num_keys - num_queries)
    return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
