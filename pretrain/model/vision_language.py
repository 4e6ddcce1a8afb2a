"""One sparse trunk for both modalities, with a contrastive and a captioning read-out.

Below `fusion_layer` attention is block-diagonal (patches see patches, text sees earlier text); from
there on text also sees the patches of its image. So one forward pass serves both objectives: the
text embedding is read at the end token below the fusion, the image embedding from the patches at
the top, which never see text, and the caption logits from the fused text. (LIMoE's one tower,
arXiv:2206.02770, with CoCa's late fusion, arXiv:2205.01917.)

Shapes: B pairs, P patches, S text positions, T tokens, D trunk width, V vocabulary, L MoE layers,
M modalities, E experts.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pretrain.config.experts import BalanceConfig, MoEConfig
from pretrain.config.schema import ModelConfig
from pretrain.model.attention import TokenLayout
from pretrain.model.block import Block, MakeMoELayer
from pretrain.model.heads import ImageHead, TextHead
from pretrain.model.layers import RMSNorm, TextEmbedding, rotary_patches, rotary_text
from pretrain.model.stem import make_stem
from pretrain.moe.layer import MoELayer
from pretrain.moe.noise import token_identity
from pretrain.moe.statistics import RouterStats, stack_stats
from pretrain.moe.tokens import RouterTokens

# Pixels are scaled to about zero mean and unit deviation; one constant serves all channels.
PIXEL_MEAN, PIXEL_DEVIATION = 127.5, 63.75


class ModelOutput(NamedTuple):
    """What one micro-batch gives; sums add over micro-batches and ranks."""

    image_embedding: Tensor
    """Unit vectors, float32 `[pairs, embed_dim]`."""
    text_embedding: Tensor
    """Unit vectors, float32 `[pairs, embed_dim]`."""
    logit_scale: Tensor
    """Contrastive scale, float32 scalar, below its ceiling."""
    caption_loss_sum: Tensor
    """Cross-entropy (nats) summed over the predicted caption tokens, float32 scalar."""
    caption_tokens: Tensor
    """Caption tokens that were predicted, int64 scalar."""
    tokens_M: Tensor
    """Tokens of each modality, int64."""
    router: RouterStats
    """What the routers of all MoE layers did, `[layers, ...]`."""


class RoutingFacts(NamedTuple):
    """What routing depends on beside the tokens; the defaults are for evaluation, where nothing
    does."""

    pair_ids_B: Tensor | None = None
    """Number of each sample in the whole data, int64; of training with random choices."""
    group_B: Tensor | None = None
    """Capacity group of each pair, int64, counted from 0 in the micro-batch; of training with
    capacity."""
    num_groups: int = 0
    """Capacity groups of the micro-batch."""
    draw: int = 0
    """Decides everything random of this step (`pretrain.moe.noise.step_draw`)."""
    coactivation: bool = False
    """Also count which experts are chosen together."""


class VisionLanguageModel(nn.Module):
    """The model. It knows no machines: `make_moe_layer` may hand in layers that do."""

    def __init__(
        self,
        model: ModelConfig,
        moe: MoEConfig,
        balance: BalanceConfig | None = None,
        *,
        logit_scale_init: float = 14.285714,
        logit_scale_max: float = 100.0,
        compute_dtype: torch.dtype = torch.float32,
        make_moe_layer: MakeMoELayer = MoELayer,
    ) -> None:
        super().__init__()
        self.config, self.moe = model, moe
        balance = balance or BalanceConfig()
        self.logit_scale_max = logit_scale_max
        self.compute_dtype = compute_dtype
        self.stem = make_stem(model)
        self.text_embedding = TextEmbedding(model.vocab_size, model.width)
        self.blocks = nn.ModuleList(
            Block(i, model, moe, balance, make_moe_layer) for i in range(model.num_layers)
        )
        self.image_head = ImageHead(model.width, model.pool_heads, model.embed_dim)
        self.text_head = TextHead(model.width, model.embed_dim)
        self.caption_norm = RMSNorm(model.width)
        # The inverse of the soft ceiling in `_scale`, so that the scale begins at
        # `logit_scale_init`.
        self.log_scale = nn.Parameter(
            torch.tensor([-math.log(1 / logit_scale_init - 1 / logit_scale_max)])
        )
        head_width = model.width // model.num_heads
        side = model.image_size // model.patch_size
        # Plain attributes, not buffers: a cast of the module to bfloat16 must not round the angles.
        self.patch_angles = rotary_patches(side, head_width, model.rope_theta)
        self.text_angles = rotary_text(model.context_length, head_width, model.rope_theta)

    def forward(
        self,
        images: Tensor,
        text_ids: Tensor,
        text_lengths: Tensor,
        text_positions: Tensor,
        facts: RoutingFacts | None = None,
    ) -> ModelOutput:
        """Embed pairs and predict their captions in one pass.

        Args:
            images: uint8 `[pairs, 3, side, side]`.
            text_ids: int64 `[pairs, S]`: start, caption, end, padding on the right.
            text_lengths: Valid tokens of each caption, marks included, int64 `[pairs]`.
            text_positions: Flat indices b x S + s of the valid tokens in row-major order, int64.
            facts: What routing depends on beside the tokens.
        """
        patches = self.config.num_patches
        layout = self._layout(images.shape[0], patches, text_ids.shape[1], text_positions, facts)
        ids_T = text_ids.flatten().index_select(0, text_positions)
        x_TD = torch.cat([self._embed_patches(images), self._embed_text(ids_T)])
        ends_B = text_lengths.cumsum(0) - 1
        split = layout.num_patch_tokens
        stats: list[RouterStats] = []
        text_embedding = x_TD.new_zeros(0)
        for index, block in enumerate(self.blocks):
            if index == self.config.fusion_layer:
                text_embedding = self.text_head(x_TD[split:].index_select(0, ends_B))
            x_TD, block_stats = self._run(block, x_TD, layout)
            if block_stats is not None:
                stats.append(block_stats)
        image_embedding = self.image_head(
            x_TD[:split].view(len(images), self.config.num_patches, x_TD.shape[1])
        )
        loss_sum, predicted = self._caption_loss(x_TD[split:], ids_T, ends_B)
        text_tokens = text_positions.shape[0]
        return ModelOutput(
            image_embedding,
            text_embedding,
            self._scale(),
            loss_sum,
            # Filled on the device: a copy from the host would make it wait for the whole pass.
            torch.full((), predicted, device=x_TD.device),
            torch.stack(
                [torch.full((), count, device=x_TD.device) for count in (split, text_tokens)]
            ),
            stack_stats(stats, self.moe.num_experts, x_TD.device),
        )

    def encode_image(self, images: Tensor) -> Tensor:
        """Embed pictures alone: unit vectors, float32 `[pairs, embed_dim]`."""
        none = torch.zeros(0, dtype=torch.int64, device=images.device)
        layout = self._layout(images.shape[0], self.config.num_patches, 0, none)
        x_TD = self._embed_patches(images)
        for block in self.blocks:
            x_TD, _ = block(x_TD, layout)
        patches_BPD = x_TD.view(images.shape[0], self.config.num_patches, self.config.width)
        return self.image_head(patches_BPD)  # type: ignore[no-any-return]

    def encode_text(self, text_ids: Tensor, text_lengths: Tensor, text_positions: Tensor) -> Tensor:
        """Embed captions alone: unit vectors, float32 `[pairs, embed_dim]`."""
        layout = self._layout(text_ids.shape[0], 0, text_ids.shape[1], text_positions)
        x_TD = self._embed_text(text_ids.flatten().index_select(0, text_positions))
        for block in list(self.blocks)[: self.config.fusion_layer]:
            x_TD, _ = block(x_TD, layout)
        return self.text_head(x_TD.index_select(0, text_lengths.cumsum(0) - 1))  # type: ignore[no-any-return]

    def caption_logits(self, images: Tensor, text_ids: Tensor, text_positions: Tensor) -> Tensor:
        """Logits of the token after each valid text token, float32 `[valid tokens, V]`."""
        layout = self._layout(
            images.shape[0], self.config.num_patches, text_ids.shape[1], text_positions
        )
        text_TD = self._embed_text(text_ids.flatten().index_select(0, text_positions))
        x_TD = torch.cat([self._embed_patches(images), text_TD])
        for block in self.blocks:
            x_TD, _ = block(x_TD, layout)
        hidden_TD = self.caption_norm(x_TD[layout.num_patch_tokens :])
        return self.text_embedding(hidden=hidden_TD).float()  # type: ignore[no-any-return]

    def next_token_logits(self, images: Tensor, text_ids: Tensor, text_lengths: Tensor) -> Tensor:
        """Logits of the token after the last valid one, float32 `[pairs, V]`: for writing
        captions."""
        positions = valid_positions(text_lengths, text_ids.shape[1])
        logits_TV = self.caption_logits(images, text_ids, positions)
        return logits_TV.index_select(0, text_lengths.cumsum(0) - 1)

    def caption_token_hits(
        self, images: Tensor, text_ids: Tensor, text_lengths: Tensor, text_positions: Tensor
    ) -> tuple[int, int]:
        """How many caption tokens are predicted right when the earlier ones are given, and of how
        many."""
        logits_TV = self.caption_logits(images, text_ids, text_positions)
        targets_T = _next_tokens(
            text_ids.flatten().index_select(0, text_positions), text_lengths.cumsum(0) - 1
        )
        hits = (logits_TV.argmax(dim=-1) == targets_T).sum()
        return int(hits), int((targets_T >= 0).sum())

    def _run(
        self, block: nn.Module, x_TD: Tensor, layout: TokenLayout
    ) -> tuple[Tensor, RouterStats | None]:
        """One block; its activations are kept or computed again in the backward pass.

        Statistics are those of the first computation: recomputation never counts a token twice.
        """
        if self.config.activation_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, x_TD, layout, use_reentrant=False)  # type: ignore[no-any-return]
        return block(x_TD, layout)  # type: ignore[no-any-return]

    def _layout(
        self,
        pairs: int,
        patches: int,
        context_length: int,
        text_positions: Tensor,
        facts: RoutingFacts | None = None,
    ) -> TokenLayout:
        """Rotary angles of every token of the flat list, and what routers are told."""
        device = text_positions.device
        if self.text_angles.device != device:
            self.patch_angles, self.text_angles = (
                self.patch_angles.to(device),
                self.text_angles.to(device),
            )
        angles = self.patch_angles[:patches].repeat(pairs, 1)
        if context_length:
            text_angles = self.text_angles.index_select(0, text_positions % context_length)
            angles = torch.cat([angles, text_angles])
        router = RouterTokens(pairs, patches, context_length, text_positions)
        if facts is not None:
            router = self._with_facts(router, facts)
        cos, sin = (f(angles).unsqueeze(1).to(self.compute_dtype) for f in (torch.cos, torch.sin))
        return TokenLayout(pairs, patches, context_length, text_positions, cos, sin, router)

    def _with_facts(self, router: RouterTokens, facts: RoutingFacts) -> RouterTokens:
        """Per-pair facts as facts of tokens, those that this run's routers need."""
        positions, context_length, patches = (
            router.text_positions,
            router.context_length,
            router.num_patches,
        )
        router = router._replace(draw=facts.draw, coactivation=facts.coactivation)
        if self.moe.is_random:
            assert facts.pair_ids_B is not None
            identity = token_identity(facts.pair_ids_B, patches, positions, context_length)
            router = router._replace(identity_T=identity)
        if self.moe.capacity_factor:
            assert facts.group_B is not None
            text_pairs = torch.div(positions, context_length, rounding_mode="floor")
            groups = (
                facts.group_B.repeat_interleave(patches),
                facts.group_B.index_select(0, text_pairs),
            )
            router = router._replace(group_T=torch.cat(groups), num_groups=facts.num_groups)
        return router

    def moe_layers(self) -> list[MoELayer]:
        """The sparse layers, in the order of their blocks."""
        return [block.ffn for block in self.blocks if isinstance(block.ffn, MoELayer)]

    def move_biases(self, choices_LME: Tensor, rate: float) -> None:
        """Move the biases of all layers after a step, by the choices of the global batch."""
        for layer, choices_ME in zip(self.moe_layers(), choices_LME, strict=True):
            layer.move_bias(choices_ME, rate)

    def biases(self) -> Tensor:
        """The biases of all layers' choices, float32 `[layers, M or 1, experts]`; no element where
        there are none."""
        found = [layer.bias.value for layer in self.moe_layers() if layer.bias is not None]
        return torch.stack(found) if found else torch.zeros(0, 1, self.moe.num_experts)

    def _embed_patches(self, images: Tensor) -> Tensor:
        """uint8 pictures -> `[pairs x P, width]`, patches in row-major order."""
        pixels = (images.to(self.compute_dtype) - PIXEL_MEAN) / PIXEL_DEVIATION
        return self.stem(pixels)  # type: ignore[no-any-return]

    def _embed_text(self, ids_T: Tensor) -> Tensor:
        # Embeddings are drawn small for the tied head; sqrt(width) brings them to the patches'
        # scale.
        return self.text_embedding(ids_T).to(self.compute_dtype) * math.sqrt(self.config.width)  # type: ignore[no-any-return]

    def _caption_loss(self, text_TD: Tensor, ids_T: Tensor, ends_B: Tensor) -> tuple[Tensor, int]:
        """Cross-entropy summed over the caption tokens, and how many they are."""
        logits_TV = self.text_embedding(hidden=self.caption_norm(text_TD)).float()
        loss_sum = F.cross_entropy(
            logits_TV, _next_tokens(ids_T, ends_B), ignore_index=-100, reduction="sum"
        )
        return loss_sum, ids_T.shape[0] - ends_B.shape[0]

    def _scale(self) -> Tensor:
        """The contrastive scale, below its ceiling.

        A soft ceiling, log s = log max - softplus(log max - p), and not a clamp: above a clamp the
        gradient is zero, so a scale that once came there would stay for ever.
        """
        ceiling = math.log(self.logit_scale_max)
        return torch.exp(ceiling - F.softplus(ceiling - self.log_scale.float()))[0]


def valid_positions(text_lengths: Tensor, context_length: int) -> Tensor:
    """Flat indices b x S + s of the valid tokens of right-padded captions, int64."""
    columns = torch.arange(context_length, device=text_lengths.device)
    return (columns < text_lengths.unsqueeze(1)).flatten().nonzero().flatten()


def _next_tokens(ids_T: Tensor, ends_B: Tensor) -> Tensor:
    """The token after each one of the flat text; -100 (nothing to predict) after an end token."""
    return ids_T.roll(-1).index_fill(0, ends_B, -100)
