"""`MoELayer` with the attributes by which DeepSpeed's engine recognizes expert parameters.

DeepSpeed 0.19.8 treats parameters as experts (reduced only over the ranks that hold the same ones,
counted once in the gradient norm, partitioned by ZeRO over the right group) if they belong to one
of its layer types and carry its tags. It would silently average untagged experts of different
ranks. The layer therefore derives from `AutoEPMoELayer`, without using its computation or
constructor.
"""

from __future__ import annotations

from typing import Any

from deepspeed.checkpoint.autoep_affine import (
    autoep_experts_for_rank,
    autoep_placement_to_affine_map,
    legacy_uniform_autoep_placement_descriptor,
)
from deepspeed.checkpoint.constants import (
    AFFINE_MAP,
    AUTOEP_EXPERT_PLACEMENT,
    AUTOEP_PARAM_EP_RANK,
    AUTOEP_PARAM_LOCAL_EXPERTS,
    AUTOEP_PARAM_LOGICAL_SHAPE,
    DS_AUTOEP_UC_META,
)
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from deepspeed.utils import groups
from torch import nn

from pretrain.config.experts import BalanceConfig, MoEConfig
from pretrain.model.block import MoELayerFactory
from pretrain.moe.layer import MoELayer
from pretrain.parallel.expert_dispatch import ExpertParallelDispatcher
from pretrain.parallel.layout import Layout


def expert_group_name(expert_parallel_size: int) -> str:
    """DeepSpeed's name of the expert-parallel groups of this size."""
    return f"ep_size_{expert_parallel_size}"


def expert_parallel_layer_factory(layout: Layout, rank: int) -> MoELayerFactory:
    """A factory of layers that hold this rank's slice of the experts."""

    def make(
        width: int, config: MoEConfig, balance: BalanceConfig, *, block_index: int, fused: bool
    ) -> MoELayer:
        return DeepSpeedMoELayer(
            width, config, balance, block_index=block_index, fused=fused, layout=layout, rank=rank
        )

    return make


class _AutoEPType(AutoEPMoELayer):
    """`AutoEPMoELayer` without its constructor, for DeepSpeed's `isinstance` checks."""

    def __init__(self) -> None:
        nn.Module.__init__(self)


class DeepSpeedMoELayer(MoELayer, _AutoEPType):
    """`MoELayer` with the attributes, tags and groups that DeepSpeed expects."""

    def __init__(
        self,
        width: int,
        config: MoEConfig,
        balance: BalanceConfig,
        *,
        block_index: int,
        fused: bool,
        layout: Layout,
        rank: int,
    ) -> None:
        super().__init__(
            width,
            config,
            balance,
            block_index=block_index,
            fused=fused,
            num_local_experts=layout.experts_per_rank,
            dispatcher=ExpertParallelDispatcher() if layout.expert_parallel_size > 1 else None,
        )
        self.num_experts = config.num_experts
        self.num_local_experts = layout.experts_per_rank
        self.ep_size = layout.expert_parallel_size
        self.ep_rank = layout.expert_rank(rank)
        self.ep_group_name = self.expert_group_name = expert_group_name(layout.expert_parallel_size)
        self.ep_group: Any = None
        self.expert_placement_descriptor = legacy_uniform_autoep_placement_descriptor(
            self.num_experts, self.num_local_experts, self.ep_size
        )
        for parameter in self.experts.parameters():
            self._tag_expert(parameter)
        gates = [self.gate] if self.caption_gate is None else [self.gate, self.caption_gate]
        for gate in gates:
            for parameter in gate.parameters():
                parameter.ds_zero_placement_family = "replicated"  # type: ignore[attr-defined]

    def set_deepspeed_parallelism(
        self, use_data_before_expert_parallel_: bool = False, folding_group_handles: Any = None
    ) -> None:
        """Called by DeepSpeed's engine: create the expert groups if needed and store this one."""
        if self.ep_group_name not in groups._get_expert_parallel_group_dict():
            groups._create_expert_and_data_parallel(
                self.ep_size, use_data_before_expert_parallel_=use_data_before_expert_parallel_
            )
        self.ep_group = groups._get_expert_parallel_group(self.ep_group_name)
        if isinstance(self.dispatcher, ExpertParallelDispatcher):
            self.dispatcher.group = self.ep_group

    def _tag_expert(self, parameter: nn.Parameter) -> None:
        """Tag as expert: not replicated; partitioned over the ranks that hold the same experts."""
        logical_shape = [self.num_experts, *parameter.shape[1:]]
        placement = self.expert_placement_descriptor
        tags = {
            "allreduce": False,
            "group_name": self.ep_group_name,
            "ds_zero_placement_family": "autoep_expert",
            "ds_zero_partition_group_name": self.ep_group_name,
            DS_AUTOEP_UC_META: {
                AUTOEP_EXPERT_PLACEMENT: placement,
                AFFINE_MAP: autoep_placement_to_affine_map(placement, logical_shape).to_dict(),
                AUTOEP_PARAM_LOGICAL_SHAPE: logical_shape,
                AUTOEP_PARAM_EP_RANK: self.ep_rank,
                AUTOEP_PARAM_LOCAL_EXPERTS: list(autoep_experts_for_rank(placement, self.ep_rank)),
            },
        }
        for name, value in tags.items():
            setattr(parameter, name, value)
