"""Construction of the model of a run, with initialized parameters."""

from __future__ import annotations

import torch

from pretrain.config.schema import RunConfig
from pretrain.model.block import MoELayerFactory
from pretrain.model.init import initialize
from pretrain.model.vision_language import VisionLanguageModel
from pretrain.moe.layer import MoELayer

COMPUTE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def build_model(
    run: RunConfig, *, make_moe_layer: MoELayerFactory = MoELayer, first_expert: int = 0
) -> VisionLanguageModel:
    """Build and initialize the model of a run, on CPU in float32.

    Args:
        run: The run.
        make_moe_layer: Creates the sparse layer of a block; engines pass their own.
        first_expert: Global index of the first expert on this rank.
    """
    model = VisionLanguageModel(
        run.model,
        run.moe,
        run.balance,
        logit_scale_init=run.loss.logit_scale_init,
        logit_scale_max=run.loss.logit_scale_max,
        compute_dtype=COMPUTE_DTYPES[run.precision.compute],
        make_moe_layer=make_moe_layer,
    )
    initialize(model, seed=run.seed, num_layers=run.model.num_layers, first_expert=first_expert)
    return model
