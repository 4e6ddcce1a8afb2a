"""One sparse transformer trunk for both modalities, with a contrastive and a captioning objective.

Below `fusion_layer`, attention is block-diagonal: patches attend to patches, text to earlier text.
From `fusion_layer` on, text also attends to the patches of its image. One forward pass serves both
objectives: the text embedding is read at the end-of-text token before `fusion_layer`, the image
embedding from the patches after the last block (they never attend to text), and the caption logits
from the text tokens after the last block.

Sources: one trunk for both modalities: Mustafa et al. 2022 (LIMoE), arXiv:2206.02770; late fusion:
Yu et al. 2022 (CoCa), arXiv:2205.01917.

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
from pretrain.model.block import Block, MoELayerFactory
from pretrain.model.heads import ImageHead, TextHead
from pretrain.model.layers import RMSNorm, TextEmbedding, rotary_angles_1d, rotary_angles_2d
from pretrain.model.stem import make_stem
from pretrain.moe.layer import MoELayer
from pretrain.moe.statistics import RouterStats, stack_stats
from pretrain.moe.tokens import TokenBatch

# Normalization of uint8 pixels to about zero mean and unit variance, the same for all channels.
PIXEL_MEAN, PIXEL_STD = 127.5, 63.75


class ModelOutput(NamedTuple):
    """Result of one micro-batch; sums can be added over micro-batches and ranks."""

    image_embedding: Tensor
    """Unit vectors, float32 `[pairs, embed_dim]`."""
    text_embedding: Tensor
    """Unit vectors, float32 `[pairs, embed_dim]`."""
    logit_scale: Tensor
    """Contrastive scale (inverse temperature), float32 scalar below `logit_scale_max`."""
    caption_loss_sum: Tensor
    """Cross-entropy (nats) summed over the predicted caption tokens, float32 scalar."""
    caption_tokens: Tensor
    """Number of predicted caption tokens, int64 scalar."""
    tokens_M: Tensor
    """Number of tokens of each modality, int64."""
    router: RouterStats
    """Statistics of the routers of all MoE layers, `[layers, ...]`."""


class VisionLanguageModel(nn.Module):
    """The model; `make_moe_layer` may supply layers that communicate with other ranks."""

    def __init__(
        self,
        model: ModelConfig,
        moe: MoEConfig,
        balance: BalanceConfig | None = None,
        *,
        logit_scale_init: float = 14.285714,
        logit_scale_max: float = 100.0,
        compute_dtype: torch.dtype = torch.float32,
        make_moe_layer: MoELayerFactory = MoELayer,
    ) -> None:
        super().__init__()
        self.config, self.moe = model, moe
        self.needs_sample_ids = moe.is_random
        """Whether training needs `TokenBatch.token_hash_T`."""
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
        # The inverse of the soft cap in `_scale`, so that the scale starts at `logit_scale_init`.
        self.log_scale = nn.Parameter(
            torch.tensor([-math.log(1 / logit_scale_init - 1 / logit_scale_max)])
        )

        head_width = model.width // model.num_heads
        side = model.image_size // model.patch_size
        # Attributes, not buffers: casting the module to bfloat16 must not round the angles.
        self.patch_angles = rotary_angles_2d(side, head_width, model.rope_theta)
        self.text_angles = rotary_angles_1d(model.context_length, head_width, model.rope_theta)

    def forward(
        self,
        images: Tensor,
        text_ids: Tensor,
        text_lengths: Tensor,
        tokens: TokenBatch,
    ) -> ModelOutput:
        """Compute embeddings and caption loss of a micro-batch in one pass.

        Args:
            images: uint8 `[pairs, 3, side, side]`.
            text_ids: int64 `[pairs, S]`: start token, caption, end token, padding on the right.
            text_lengths: Valid tokens of each caption, start and end tokens included, int64
                `[pairs]`.
            tokens: Which tokens are valid, and what random routing and capacity limits need
                (`token_batch`).
        """
        tokens = self._with_rotary(tokens)
        ids_T = text_ids.flatten().index_select(0, tokens.text_positions)
        x_TD = torch.cat([self._embed_patches(images), self._embed_text(ids_T)])
        ends_B = text_lengths.cumsum(0) - 1
        split = tokens.num_patch_tokens

        stats: list[RouterStats] = []
        text_embedding = x_TD.new_zeros(0)
        for index, block in enumerate(self.blocks):
            if index == self.config.fusion_layer:
                text_embedding = self.text_head(x_TD[split:].index_select(0, ends_B))
            x_TD, block_stats = self._run(block, x_TD, tokens)
            if block_stats is not None:
                stats.append(block_stats)

        image_embedding = self.image_head(
            x_TD[:split].view(len(images), tokens.num_patches, x_TD.shape[1])
        )
        loss_sum, predicted = self._caption_loss(x_TD[split:], ids_T, ends_B)

        # `full` fills on the device; copying from the host would wait for the whole forward pass.
        counts = [
            torch.full((), count, device=x_TD.device)
            for count in (predicted, split, tokens.text_positions.shape[0])
        ]
        return ModelOutput(
            image_embedding=image_embedding,
            text_embedding=text_embedding,
            logit_scale=self._scale(),
            caption_loss_sum=loss_sum,
            caption_tokens=counts[0],
            tokens_M=torch.stack(counts[1:]),
            router=stack_stats(stats, self.moe.num_experts, x_TD.device),
        )

    def token_batch(self, text_ids: Tensor, text_positions: Tensor) -> TokenBatch:
        """The tokens of image-text pairs for `forward`, as evaluation needs them.

        Args:
            text_ids: `[pairs, S]`.
            text_positions: Flat indices b x S + s of the valid tokens in row-major order, int64.
        """
        return TokenBatch(
            text_ids.shape[0], self.config.num_patches, text_ids.shape[1], text_positions
        )

    def encode_image(self, images: Tensor) -> Tensor:
        """Embed images without captions: unit vectors, float32 `[images, embed_dim]`."""
        no_text = torch.zeros(0, dtype=torch.int64, device=images.device)
        tokens = TokenBatch(images.shape[0], self.config.num_patches, 0, no_text)
        tokens = self._with_rotary(tokens)
        x_TD = self._embed_patches(images)
        for block in self.blocks:
            x_TD, _ = block(x_TD, tokens)
        patches_BPD = x_TD.view(images.shape[0], self.config.num_patches, self.config.width)
        return self.image_head(patches_BPD)  # type: ignore[no-any-return]

    def encode_text(self, text_ids: Tensor, text_lengths: Tensor, text_positions: Tensor) -> Tensor:
        """Embed captions without images: unit vectors, float32 `[captions, embed_dim]`."""
        tokens = TokenBatch(text_ids.shape[0], 0, text_ids.shape[1], text_positions)
        tokens = self._with_rotary(tokens)
        x_TD = self._embed_text(text_ids.flatten().index_select(0, text_positions))
        for block in list(self.blocks)[: self.config.fusion_layer]:
            x_TD, _ = block(x_TD, tokens)
        embedding: Tensor = self.text_head(x_TD.index_select(0, text_lengths.cumsum(0) - 1))
        return embedding

    def caption_logits(self, images: Tensor, text_ids: Tensor, text_positions: Tensor) -> Tensor:
        """Next-token logits at each valid text token, float32 `[valid tokens, V]`."""
        tokens = self._with_rotary(self.token_batch(text_ids, text_positions))
        text_TD = self._embed_text(text_ids.flatten().index_select(0, text_positions))
        x_TD = torch.cat([self._embed_patches(images), text_TD])
        for block in self.blocks:
            x_TD, _ = block(x_TD, tokens)
        hidden_TD = self.caption_norm(x_TD[tokens.num_patch_tokens :])
        return self.text_embedding(hidden=hidden_TD).float()  # type: ignore[no-any-return]

    def next_token_logits(self, images: Tensor, text_ids: Tensor, text_lengths: Tensor) -> Tensor:
        """Logits of the token after the last valid one, float32 `[pairs, V]`, for caption
        generation."""
        positions = valid_positions(text_lengths, text_ids.shape[1])
        logits_TV = self.caption_logits(images, text_ids, positions)
        return logits_TV.index_select(0, text_lengths.cumsum(0) - 1)

    def count_correct_tokens(
        self, images: Tensor, text_ids: Tensor, text_lengths: Tensor, text_positions: Tensor
    ) -> tuple[int, int]:
        """Number of caption tokens predicted correctly given the earlier ones, and the number of
        predicted tokens."""
        logits_TV = self.caption_logits(images, text_ids, text_positions)
        targets_T = _next_tokens(
            text_ids.flatten().index_select(0, text_positions), text_lengths.cumsum(0) - 1
        )
        num_correct = (logits_TV.argmax(dim=-1) == targets_T).sum()
        return int(num_correct), int((targets_T >= 0).sum())

    def moe_layers(self) -> list[MoELayer]:
        """The sparse layers in the order of their blocks."""
        return [block.ffn for block in self.blocks if isinstance(block.ffn, MoELayer)]

    def update_biases(self, assignments_LME: Tensor, rate: float) -> None:
        """Update the expert biases after a step, given the assignments of the global batch."""
        for layer, assignments_ME in zip(self.moe_layers(), assignments_LME, strict=True):
            layer.update_bias(assignments_ME, rate)

    def biases(self) -> Tensor:
        """The expert biases of all layers, float32 `[layers, M or 1, experts]`; empty without
        biases."""
        values = [layer.bias.value for layer in self.moe_layers() if layer.bias is not None]
        return torch.stack(values) if values else torch.zeros(0, 1, self.moe.num_experts)

    def set_biases(self, values: Tensor) -> None:
        """Set the expert biases to the result of an earlier call of `biases`."""
        biases = [layer.bias for layer in self.moe_layers() if layer.bias is not None]
        for bias, value in zip(biases, values, strict=True):
            bias.value.copy_(value)

    def _run(
        self, block: nn.Module, x_TD: Tensor, tokens: TokenBatch
    ) -> tuple[Tensor, RouterStats | None]:
        """Run one block, with activation checkpointing if configured.

        The statistics are those of the first computation: recomputation does not count tokens
        twice.
        """
        if self.config.activation_checkpointing and torch.is_grad_enabled():
            output: tuple[Tensor, RouterStats | None]
            output = checkpoint(block, x_TD, tokens, use_reentrant=False)
        else:
            output = block(x_TD, tokens)
        return output

    def _with_rotary(self, tokens: TokenBatch) -> TokenBatch:
        """Add the rotary angles of all tokens."""
        device = tokens.text_positions.device
        if self.text_angles.device != device:
            self.patch_angles = self.patch_angles.to(device)
            self.text_angles = self.text_angles.to(device)

        angles = self.patch_angles[: tokens.num_patches].repeat(tokens.num_pairs, 1)
        if tokens.context_length:
            columns = tokens.text_positions % tokens.context_length
            angles = torch.cat([angles, self.text_angles.index_select(0, columns)])
        cos, sin = (f(angles).unsqueeze(1).to(self.compute_dtype) for f in (torch.cos, torch.sin))
        return tokens._replace(cos_T1R=cos, sin_T1R=sin)

    def _embed_patches(self, images: Tensor) -> Tensor:
        """uint8 images -> `[images x P, width]`, patches in row-major order."""
        pixels = (images.to(self.compute_dtype) - PIXEL_MEAN) / PIXEL_STD
        return self.stem(pixels)  # type: ignore[no-any-return]

    def _embed_text(self, ids_T: Tensor) -> Tensor:
        # Embeddings are initialized small for the tied LM head; sqrt(width) scales them to the
        # magnitude of the patch tokens.
        embedded_TD: Tensor = self.text_embedding(ids_T).to(self.compute_dtype)
        return embedded_TD * math.sqrt(self.config.width)

    def _caption_loss(self, text_TD: Tensor, ids_T: Tensor, ends_B: Tensor) -> tuple[Tensor, int]:
        """Cross-entropy summed over the caption tokens, and their number."""
        logits_TV = self.text_embedding(hidden=self.caption_norm(text_TD)).float()
        loss_sum = F.cross_entropy(
            logits_TV, _next_tokens(ids_T, ends_B), ignore_index=-100, reduction="sum"
        )
        return loss_sum, ids_T.shape[0] - ends_B.shape[0]

    def _scale(self) -> Tensor:
        """The contrastive scale, below `logit_scale_max`.

        A soft cap, log s = log max - softplus(log max - p), instead of a clamp: the gradient of a
        clamp is zero above the bound, so the scale could never decrease again.
        """
        log_max = math.log(self.logit_scale_max)
        return torch.exp(log_max - F.softplus(log_max - self.log_scale.float()))[0]


def valid_positions(text_lengths: Tensor, context_length: int) -> Tensor:
    """Flat indices b x S + s of the valid tokens of right-padded captions, int64."""
    columns = torch.arange(context_length, device=text_lengths.device)
    return (columns < text_lengths.unsqueeze(1)).flatten().nonzero().flatten()


def _next_tokens(ids_T: Tensor, ends_B: Tensor) -> Tensor:
    """The token after each one of the flat text; -100 (ignored by the loss) after end tokens."""
    return ids_T.roll(-1).index_fill(0, ends_B, -100)
