"""From a run to a model with its first values."""

from __future__ import annotations

import torch

from pretrain.config.schema import RunConfig
from pretrain.model.block import MakeMoELayer
from pretrain.model.init import initialize
from pretrain.model.vision_language import VisionLanguageModel
from pretrain.moe.layer import MoELayer

COMPUTE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def build_model(
    run: RunConfig, *, make_moe_layer: MakeMoELayer = MoELayer, first_expert: int = 0
) -> VisionLanguageModel:
    """Build the model of a run with its first values.

    Args:
        run: The run.
        make_moe_layer: Makes a sparse layer of (width, config); expert-parallel layers come in
            here.
        first_expert: Global number of the first expert this rank holds.
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
