"""One step, where it meets what a run may bring: here, a global batch of which nothing is left."""

from __future__ import annotations

import math

import pytest
import torch

from data_pipeline.common.config import apply_overrides, from_mapping
from data_pipeline.samples import Batch
from pretrain.config.schema import RunConfig
from pretrain.model import build_model
from pretrain.model.vision_language import valid_positions
from pretrain.parallel.layout import Layout
from pretrain.parallel.plain_engine import PlainEngine
from pretrain.train.step import train_step

SMALL = [
    "model={width: 32, num_blocks: 2, num_heads: 2, pool_heads: 2, ffn_width: 32, fusion_start: 1, image_size: 16, "
    "patch_size: 8, vocab_size: 64, text_length: 8, embed_dim: 16}", "moe={num_experts: 4, expert_width: 8}",
    "balance={bias: sign, bias_per_modality: true, expert_l1_weight: 1e-3}",
    "batch={pairs_per_step: 8, pairs_per_forward: 4}",
]  # fmt: skip


def batch(pairs: int) -> Batch:
    lengths = torch.full((pairs,), 5)
    rows = torch.arange(pairs)
    images = torch.randint(0, 256, (pairs, 3, 16, 16), dtype=torch.uint8)
    text_ids = torch.randint(4, 64, (pairs, 8))
    return Batch(images, text_ids, lengths, valid_positions(lengths, 8), rows, (), (), (), 0.0, rows, rows)


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_step_without_any_pair_moves_nothing(micro_batches: int) -> None:
    torch.manual_seed(0)
    run = from_mapping(RunConfig, apply_overrides({}, SMALL))
    layout = Layout(world=1, expert_parallel=1, zero_stage=-1, precision="fp32", num_experts=4)
    engine = PlainEngine(build_model(run), run.optim, layout, torch.device("cpu"))

    def step(number: int, pairs: int) -> tuple[int, float, dict[str, torch.Tensor]]:
        batches = [batch(pairs) for _ in range(micro_batches)]
        result = train_step(engine, batches, run, step=number, learning_rate=1e-2)
        return result.pairs, result.grad_norm, {k: v.clone() for k, v in engine.model.state_dict().items()}

    pairs, norm, before = step(0, 4)  # from here on the moments alone would move the weights
    assert pairs == 4 * micro_batches and norm > 0
    pairs, norm, after = step(1, 0)
    assert pairs == 0 and math.isnan(norm)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert any("bias" in name and value.abs().sum() > 0 for name, value in before.items())
