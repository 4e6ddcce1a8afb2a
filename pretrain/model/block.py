"""Pre-norm transformer block: attention, then a dense or a sparse feed-forward network."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn

from pretrain.config.experts import BalanceConfig, MoEConfig
from pretrain.config.schema import ModelConfig
from pretrain.model.attention import Attention
from pretrain.model.layers import RMSNorm
from pretrain.moe.layer import MoELayer, SwiGLU
from pretrain.moe.statistics import RouterStats
from pretrain.moe.tokens import TokenBatch


class MoELayerFactory(Protocol):
    """Creates the sparse layer of a block; the class `MoELayer` is one."""

    def __call__(
        self,
        width: int,
        config: MoEConfig,
        balance: BalanceConfig,
        *,
        block_index: int,
        fused: bool,
    ) -> MoELayer:
        """Arguments as for `MoELayer`."""
        ...


class Block(nn.Module):
    """Block `index` of the trunk; text attends to patches from block `model.fusion_layer` on."""

    def __init__(
        self,
        index: int,
        model: ModelConfig,
        moe: MoEConfig,
        balance: BalanceConfig,
        make_moe_layer: MoELayerFactory,
    ) -> None:
        super().__init__()
        fused = index >= model.fusion_layer
        self.attention_norm = RMSNorm(model.width)
        self.attention = Attention(model.width, model.num_heads, fused=fused)
        self.ffn_norm = RMSNorm(model.width)

        self.is_sparse = index in moe.blocks(model.num_layers)
        self.ffn: nn.Module
        if self.is_sparse:
            self.ffn = make_moe_layer(model.width, moe, balance, block_index=index, fused=fused)
        else:
            self.ffn = SwiGLU(model.width, model.ffn_width)

    def forward(self, x_TD: Tensor, tokens: TokenBatch) -> tuple[Tensor, RouterStats | None]:
        """Return the tokens `[tokens, width]` and, for a sparse block, the router's statistics."""
        x_TD = x_TD + self.attention(self.attention_norm(x_TD), tokens)
        normed_TD = self.ffn_norm(x_TD)
        if self.is_sparse:
            y_TD, stats = self.ffn(normed_TD, tokens)
            return x_TD + y_TD, stats
        return x_TD + self.ffn(normed_TD), None
