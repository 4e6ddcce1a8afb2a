"""A small run for tests of one training step, and the step computed from the definitions."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from data_pipeline.common.config import apply_overrides, from_mapping
from data_pipeline.samples import Batch
from pretrain.config.schema import RunConfig
from pretrain.model import build_model
from pretrain.model.vision_language import VisionLanguageModel, valid_positions
from pretrain.parallel.inputs import model_inputs
from pretrain.parallel.layout import Layout
from pretrain.parallel.plain_engine import PlainEngine
from tests.unit.pretrain.test_losses import full_matrix_loss

MODEL = (
    "model={width: 32, num_layers: 2, num_heads: 2, pool_heads: 2, ffn_width: 32, fusion_layer: 1, "
    "image_size: 16, patch_size: 8, vocab_size: 64, context_length: 8, embed_dim: 16}"
)
SMALL = [
    MODEL,
    "moe={num_experts: 4, expert_width: 8}",
    "balance={bias: sign, bias_per_modality: true, expert_l1_weight: 1e-3}",
    "batch={global_batch_size: 8, micro_batch_size: 4}",
]
NUM_EXPERTS, BIAS_RATE = 4, 0.01
TASK_WEIGHTS = {"contrastive": 0.7, "caption": 1.3, "balance": 0.3, "router_z": 0.2}
REFERENCE_SETTINGS = [
    MODEL,
    "moe={num_experts: 4, top_k: 2, expert_width: 8, start: 0}",
    "moe={capacity_factor: 0.5, capacity_group_size: 2}",
    "loss={contrastive_weight: 0.7, caption_weight: 1.3}",
    "schedule={total_steps: 10, warmup_steps: 0}",
    "balance={balance_weight: 0.3, router_z_weight: 0.2, bias: sign, bias_rate: 0.01}",
    "balance={bias_freeze_ratio: 0.2}",
    "optim.clip_norm=0",
]
"""No weight is 1, some assignments are dropped, and biases are frozen from step 8 on."""


def make_engine(*overrides: str) -> tuple[PlainEngine, RunConfig]:
    run = from_mapping(RunConfig, apply_overrides({}, list(overrides)))
    layout = Layout(
        world_size=1,
        expert_parallel_size=1,
        zero_stage=-1,
        precision="fp32",
        num_experts=NUM_EXPERTS,
    )
    return PlainEngine(build_model(run), run.optim, layout, torch.device("cpu")), run


def make_batch(pairs: int) -> Batch:
    lengths = torch.full((pairs,), 5)
    rows = torch.arange(pairs)
    images = torch.randint(0, 256, (pairs, 3, 16, 16), dtype=torch.uint8)
    text_ids = torch.randint(4, 64, (pairs, 8))
    return Batch(
        images, text_ids, lengths, valid_positions(lengths, 8), rows, (), (), (), 0.0, rows, rows
    )


def split_batch(batch: Batch, micro_batches: int) -> list[Batch]:
    """Consecutive micro-batches of a global batch."""
    num_pairs = len(batch.images)
    size = num_pairs // micro_batches
    parts = []
    for first in range(0, num_pairs, size):
        rows = slice(first, first + size)
        lengths = batch.text_lengths[rows]
        parts.append(
            batch._replace(
                images=batch.images[rows],
                text_ids=batch.text_ids[rows],
                text_lengths=lengths,
                text_positions=valid_positions(lengths, 8),
                caption_hashes=batch.caption_hashes[rows],
                ids=batch.ids[rows],
                slots=torch.arange(size),
            )
        )
    return parts


class ReferenceStep(NamedTuple):
    """A step computed from the definitions, on the whole global batch at once."""

    losses: dict[str, float]
    gradients: dict[str, Tensor]
    biases: Tensor
    biases_from_kept: Tensor
    """The biases if dropped assignments did not count."""


def reference_step(model: VisionLanguageModel, batch: Batch, run: RunConfig) -> ReferenceStep:
    """Losses, gradients and biases, from the model's embeddings and its routers' inputs."""
    router_inputs: list[Tensor] = []
    hooks = [
        layer.register_forward_pre_hook(lambda _, inputs: router_inputs.append(inputs[0]))
        for layer in model.moe_layers()
    ]
    cpu = torch.device("cpu")
    output = model(*model_inputs(batch, model, cpu))
    for hook in hooks:
        hook.remove()

    balance, z, biases, biases_from_kept = [], [], [], []
    for index, (layer, x_TD) in enumerate(zip(model.moe_layers(), router_inputs, strict=True)):
        logits_TE = x_TD @ layer.gate.weight.T
        probs_TE = torch.softmax(logits_TE, 1)
        assert layer.bias is not None
        load_E = top_k_load(probs_TE + layer.bias.value, run.moe.top_k)
        balance.append(NUM_EXPERTS * (load_E / load_E.sum() * probs_TE.mean(0)).sum())
        z.append((logits_TE.exp().sum(1).log() ** 2).mean())
        biases.append(updated_bias(layer.bias.value[0], load_E))
        kept_E = output.router.kept_ME[index].sum(0)
        biases_from_kept.append(updated_bias(layer.bias.value[0], kept_E))

    num_caption_tokens = sum(int(length) - 1 for length in batch.text_lengths)
    terms = {
        "contrastive": full_matrix_loss(
            output.image_embedding,
            output.text_embedding,
            output.logit_scale,
            batch.caption_hashes,
            run.loss.mask_equal_captions,
        ),
        "caption": output.caption_loss_sum / num_caption_tokens,
        "balance": sum(balance) / len(balance),
        "router_z": sum(z) / len(z),
    }
    weighted = {f"weighted/{name}": TASK_WEIGHTS[name] * term for name, term in terms.items()}
    total = sum(weighted.values())
    parameters = dict(model.named_parameters())
    gradients = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
    losses = {"total": total} | terms | weighted
    return ReferenceStep(
        {name: float(value.detach()) for name, value in losses.items()},
        {name: g for name, g in zip(parameters, gradients, strict=True) if g is not None},
        torch.stack(biases),
        torch.stack(biases_from_kept),
    )


def top_k_load(scores_TE: Tensor, k: int) -> Tensor:
    """Number of tokens for which an expert is among the k best, `[E]`."""
    load_E = torch.zeros(NUM_EXPERTS)
    for row in scores_TE.tolist():
        for expert in sorted(range(NUM_EXPERTS), key=lambda e: -row[e])[:k]:
            load_E[expert] += 1
    return load_E


def updated_bias(bias_E: Tensor, load_E: Tensor) -> Tensor:
    return bias_E - BIAS_RATE * torch.sign(load_E - load_E.double().mean())
