"""Parameter and FLOP counts of a model, computed from its configuration.

No model is built, so counting takes no time even for the largest one; tests compare the counts with
real models. "Active" excludes the routed experts that a token is not assigned to.

FLOPs are those of matrix products: a product of [m, k] and [k, n] is 2 m k n. Norms, softmax,
rotary positions, the sorting of assignments and the B x G contrastive logits are not counted; they
are below 1 % at all sizes here. Recomputed activations are not counted either, so that FLOP/s can
be compared across settings (model FLOPs, as in Chowdhery et al. 2022 (PaLM), arXiv:2204.02311,
appendix B).

Shapes: P patches, S text tokens, D trunk width, F hidden width, Q head width, V vocabulary, E
experts, K experts per token.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

from pretrain.config.experts import MoEConfig
from pretrain.config.schema import ModelConfig


class ParameterCount(NamedTuple):
    """Numbers of parameters."""

    trunk_total: int
    """The transformer blocks: attention, feed-forward networks, experts, routers and their
    norms."""
    trunk_active: int
    """The same, counting only the routed experts that one token is assigned to."""
    embeddings: int
    """Patch embedding, and the token embedding that is tied to the LM head."""
    heads: int
    """Pooling, projections, final norms and the contrastive scale."""

    @property
    def total(self) -> int:
        """All parameters."""
        return self.trunk_total + self.embeddings + self.heads

    @property
    def active(self) -> int:
        """All parameters except the routed experts that a token is not assigned to."""
        return self.trunk_active + self.embeddings + self.heads


class FlopCount(NamedTuple):
    """Floating-point operations for one image-text pair."""

    forward: float
    """One forward pass."""

    @property
    def training(self) -> float:
        """Forward and backward pass; the backward pass has two matrix products for each one of the
        forward pass."""
        return 3 * self.forward


def count_parameters(model: ModelConfig, moe: MoEConfig) -> ParameterCount:
    """Count the parameters of `VisionLanguageModel(model, moe)`.

    Args:
        model: Sizes of the trunk and heads.
        moe: Sizes of the experts, and which blocks are sparse.
    """
    width = model.width
    head_width = width // model.num_heads
    num_sparse = len(moe.blocks(model.num_layers))
    num_dense = model.num_layers - num_sparse

    # qkv and out; two norms; QK-norm has one weight per channel of a head, for q and for k.
    attention = 4 * width * width + 2 * width + 2 * head_width
    expert = 3 * width * moe.expert_width
    always_active = (
        model.num_layers * attention
        + num_dense * 3 * width * model.ffn_width
        + num_sparse * (width * moe.num_experts + moe.shared_experts * expert)
        + _num_caption_gates(model, moe) * 2 * width * moe.num_experts
    )

    # Norm, query, key and value projections, output projection.
    pooling = width + width + 2 * width * width + width * model.embed_dim
    text_head = width + width * model.embed_dim
    caption_norm, logit_scale = width, 1
    return ParameterCount(
        trunk_total=always_active + num_sparse * moe.num_experts * expert,
        trunk_active=always_active + num_sparse * moe.top_k * expert,
        embeddings=_stem_parameters(model) + model.vocab_size * width,
        heads=pooling + text_head + caption_norm + logit_scale,
    )


def count_flops(model: ModelConfig, moe: MoEConfig, *, text_tokens: float) -> FlopCount:
    """Count the floating-point operations for one pair, active experts only.

    forward = 2 P (3 p^2) D                                   linear stem
              (conv stem: 2 x 9 x in x out per output pixel)
            + sum over blocks of 2 (P + S) (4 D^2 + ffn)      projections and feed-forward
            + sum over blocks of 4 D (P^2 + S (S + 1) / 2)    attention, unmasked keys only
            + sum over fused blocks of 4 D S P
            + sum over blocks with a caption gate of S x 4 D E
            + 4 P D^2 + 4 P D + 2 D embed_dim                 attention pooling
            + 2 D embed_dim + 2 S D V                         text projection, LM head
    ffn     = 3 D F in a dense block, D E + (K + shared) 3 D F_expert in a sparse one
    p is the side of a patch; the backward pass costs twice the forward pass.

    Args:
        model: Sizes of the trunk and heads.
        moe: Sizes of the experts, and which blocks are sparse.
        text_tokens: Mean number of valid text tokens of a caption, start and end tokens included
            (S).
    """
    width, patches = model.width, model.num_patches
    sparse_blocks = set(moe.blocks(model.num_layers))
    dense_ffn = 3 * width * model.ffn_width
    num_active_experts = moe.top_k + moe.shared_experts
    sparse_ffn = width * moe.num_experts + num_active_experts * 3 * width * moe.expert_width

    forward: float = _stem_flops(model)
    for block in range(model.num_layers):
        ffn = sparse_ffn if block in sparse_blocks else dense_ffn
        unmasked = patches**2 + text_tokens * (text_tokens + 1) / 2
        if block >= model.fusion_layer:
            unmasked += text_tokens * patches
        forward += 2 * (patches + text_tokens) * (4 * width**2 + ffn) + 4 * width * unmasked
    forward += _num_caption_gates(model, moe) * text_tokens * 4 * width * moe.num_experts
    forward += 4 * patches * width**2 + 4 * patches * width + 2 * width * model.embed_dim
    forward += 2 * width * model.embed_dim + 2 * text_tokens * width * model.vocab_size
    return FlopCount(forward)


def _num_caption_gates(model: ModelConfig, moe: MoEConfig) -> int:
    """Number of sparse blocks whose router also reads the caption."""
    fused = [block for block in moe.blocks(model.num_layers) if block >= model.fusion_layer]
    return len(fused) if moe.router_input == "caption" else 0


def _stem_parameters(model: ModelConfig) -> int:
    """Parameters between the pixels and the patch tokens."""
    if model.stem == "linear":
        return 3 * model.patch_size**2 * model.width
    convs = sum(9 * num_in * num_out + num_out for num_in, num_out, _ in _convolutions(model))
    return convs + _convolutions(model)[-1][1] * model.width


def _stem_flops(model: ModelConfig) -> float:
    """Forward FLOPs of the stem for one image."""
    if model.stem == "linear":
        return 2 * model.num_patches * 3 * model.patch_size**2 * model.width
    convs = sum(
        2 * 9 * num_in * num_out * side**2 for num_in, num_out, side in _convolutions(model)
    )
    return convs + 2 * model.num_patches * _convolutions(model)[-1][1] * model.width


def _convolutions(model: ModelConfig) -> list[tuple[int, int, int]]:
    """(input channels, output channels, side of the output) of each convolution of the stem."""
    convolutions = []
    for index, (num_in, num_out) in enumerate(pairwise(model.stem_channels), start=1):
        convolutions.append((num_in, num_out, model.image_size >> index))
    return convolutions
