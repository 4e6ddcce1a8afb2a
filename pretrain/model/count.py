"""Counts parameters and floating-point operations of a model from its config alone.

Plain arithmetic: nothing is built, so the largest model is counted in no time. A test holds it
equal to the model that is really built. "Active" leaves out the routed experts that a token does
not visit.

FLOPs are those of matrix products; a product of [m, k] and [k, n] is 2 m k n. Norms, softmax,
rotary positions, the sort of the dispatch and the B x G contrastive scores are left out: below 1%
at every size here. Recomputed activations are not counted either, so that a rate in FLOP/s compares
across settings (model FLOPs, as in PaLM, arXiv:2204.02311, appendix B).

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
    """The transformer blocks: attention, feed-forward, experts, routers and their norms."""
    trunk_active: int
    """The same, with only the experts that one token visits."""
    embeddings: int
    """Patch embedding, and the token embedding that is tied with the LM head."""
    heads: int
    """Pooling, projections, last norms and the contrastive scale."""

    @property
    def total(self) -> int:
        """All parameters."""
        return self.trunk_total + self.embeddings + self.heads

    @property
    def active(self) -> int:
        """All parameters but the routed experts that one token does not visit."""
        return self.trunk_active + self.embeddings + self.heads


class FlopCount(NamedTuple):
    """Floating-point operations for one image-text pair."""

    forward: float
    """One forward pass."""

    @property
    def training(self) -> float:
        """Forward and backward; the backward pass does two products for each one of the forward
        pass."""
        return 3 * self.forward


def count_parameters(model: ModelConfig, moe: MoEConfig) -> ParameterCount:
    """Count the parameters of `VisionLanguageModel(model, moe)`.

    Args:
        model: Sizes of the trunk and heads.
        moe: Sizes and places of the experts.
    """
    width = model.width
    head_width = width // model.num_heads
    sparse = len(moe.blocks(model.num_layers))
    dense = model.num_layers - sparse
    # qkv and out; two norms; QK-norm has one weight per channel of a head, for q and for k.
    attention = 4 * width * width + 2 * width + 2 * head_width
    expert = 3 * width * moe.expert_width
    fixed = (
        model.num_layers * attention
        + dense * 3 * width * model.ffn_width
        + sparse * (width * moe.num_experts + moe.shared_experts * expert)
        + _caption_gates(model, moe) * 2 * width * moe.num_experts
    )
    pooling = (
        width + width + 2 * width * width + width * model.embed_dim
    )  # norm, query, k and v, out
    text_head = width + width * model.embed_dim
    caption_norm, logit_scale = width, 1
    return ParameterCount(
        trunk_total=fixed + sparse * moe.num_experts * expert,
        trunk_active=fixed + sparse * moe.top_k * expert,
        embeddings=_stem_parameters(model) + model.vocab_size * width,
        heads=pooling + text_head + caption_norm + logit_scale,
    )


def count_flops(model: ModelConfig, moe: MoEConfig, *, text_tokens: float) -> FlopCount:
    """Count the floating-point operations for one pair, active experts only.

    forward = 2 P (3 p^2) D                                                   linear stem
              (or 2 x 9 x in x out for each pixel that a convolution puts out)
            + sum over blocks of 2 (P + S) (4 D^2 + ffn)                      projections and feed-forward
            + sum over blocks of 4 D (P^2 + S (S + 1) / 2 [+ S P if fused])   scores and values, visible keys only
            + blocks with a caption gate x S x 4 D E
            + 4 P D^2 + 4 P D + 2 D embed_dim                                 attention pooling
            + 2 D embed_dim + 2 S D V                                         text projection, LM head
    ffn     = 3 D F in a dense block, D E + (K + shared) 3 D F_expert in a sparse one
    p is the side of a patch; the backward pass costs twice the forward pass.

    Args:
        model: Sizes of the trunk and heads.
        moe: Sizes and places of the experts.
        text_tokens: Average valid text tokens of a caption, start and end marks included (S).
    """
    width, patches = model.width, model.num_patches
    sparse_blocks = set(moe.blocks(model.num_layers))
    dense_ffn = 3 * width * model.ffn_width
    sparse_ffn = (
        width * moe.num_experts + (moe.top_k + moe.shared_experts) * 3 * width * moe.expert_width
    )
    forward: float = _stem_flops(model)
    for block in range(model.num_layers):
        ffn = sparse_ffn if block in sparse_blocks else dense_ffn
        visible = patches**2 + text_tokens * (text_tokens + 1) / 2
        if block >= model.fusion_layer:
            visible += text_tokens * patches
        forward += 2 * (patches + text_tokens) * (4 * width**2 + ffn) + 4 * width * visible
    forward += _caption_gates(model, moe) * text_tokens * 4 * width * moe.num_experts
    forward += 4 * patches * width**2 + 4 * patches * width + 2 * width * model.embed_dim
    forward += 2 * width * model.embed_dim + 2 * text_tokens * width * model.vocab_size
    return FlopCount(forward)


def _caption_gates(model: ModelConfig, moe: MoEConfig) -> int:
    """Sparse blocks whose router also reads the caption."""
    fused = [block for block in moe.blocks(model.num_layers) if block >= model.fusion_layer]
    return len(fused) if moe.router_input == "caption" else 0


def _stem_parameters(model: ModelConfig) -> int:
    """Parameters between the pixels and the patch tokens."""
    if model.stem == "linear":
        return 3 * model.patch_size**2 * model.width
    convs = sum(9 * num_in * num_out + num_out for num_in, num_out, _ in _convolutions(model))
    return convs + _convolutions(model)[-1][1] * model.width


def _stem_flops(model: ModelConfig) -> float:
    """Forward FLOPs of the stem for one picture."""
    if model.stem == "linear":
        return 2 * model.num_patches * 3 * model.patch_size**2 * model.width
    convs = sum(
        2 * 9 * num_in * num_out * side**2 for num_in, num_out, side in _convolutions(model)
    )
    return convs + 2 * model.num_patches * _convolutions(model)[-1][1] * model.width


def _convolutions(model: ModelConfig) -> list[tuple[int, int, int]]:
    """(channels in, channels out, side of the output) of each convolution of the stem."""
    channels = model.stem_channels
    steps = enumerate(pairwise(channels), start=1)
    return [(num_in, num_out, model.image_size >> step) for step, (num_in, num_out) in steps]
