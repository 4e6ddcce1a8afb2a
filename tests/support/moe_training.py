"""Short runs of a tiny sparse model on generated pairs, in this process, without DeepSpeed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from data_pipeline.samples import Batch
from pretrain.config.presets import load_run
from pretrain.config.schema import RunConfig
from pretrain.model import build_model
from pretrain.model.vision_language import valid_positions
from pretrain.parallel.layout import Layout
from pretrain.parallel.plain_engine import PlainEngine
from pretrain.train.step import train_step
from pretrain.train.step_result import StepResult

NUM_PAIRS, NUM_PATCHES, NUM_STEPS, NUM_CLASSES = 32, 16, 100, 12


def make_batch(step: int) -> Batch:
    """Noisy images of twelve classes; each class has its own caption, cut at a random length."""
    fixed, sampled = torch.Generator().manual_seed(99), torch.Generator().manual_seed(step)
    class_images = torch.randint(0, 256, (NUM_CLASSES, 3, 16, 16), generator=fixed).float()
    class_captions = torch.randint(4, 60, (NUM_CLASSES, 8), generator=fixed)

    classes = torch.randint(0, NUM_CLASSES, (NUM_PAIRS,), generator=sampled)
    noise = torch.rand(NUM_PAIRS, 3, 16, 16, generator=sampled)
    images = (0.7 * class_images[classes] + 76 * noise).to(torch.uint8)
    lengths = torch.randint(4, 9, (NUM_PAIRS,), generator=sampled)
    token_ids = class_captions[classes] * (torch.arange(8) < lengths.unsqueeze(1))
    slots = torch.arange(NUM_PAIRS)
    return Batch(
        images=images,
        text_ids=token_ids,
        text_lengths=lengths,
        text_positions=valid_positions(lengths, 8),
        caption_hashes=classes,
        keys=(),
        captions=(),
        problems=(),
        seconds=0.0,
        ids=NUM_PAIRS * step + slots,
        slots=slots,
    )


def small_run(folder: Path, presets: str, *overrides: str) -> RunConfig:
    """A run that extends `presets`, with a model of three layers and width 32."""
    path = folder / "run.yaml"
    path.write_text(f"extends: {presets}\n")
    model = (
        "model={width: 32, num_layers: 3, num_heads: 2, pool_heads: 2, ffn_width: 48, "
        "image_size: 16, patch_size: 4, vocab_size: 64, context_length: 8, embed_dim: 32}"
    )
    batch = f"batch={{global_batch_size: {NUM_PAIRS}, micro_batch_size: {NUM_PAIRS}}}"
    schedule = [f"schedule.total_steps={NUM_STEPS}", "schedule.warmup_steps=0"]
    return load_run(path, [model, "moe.expert_width=16", batch, *schedule, *overrides])


def make_engine(run: RunConfig) -> PlainEngine:
    """The single-process engine with a newly initialized model."""
    layout = Layout(
        world_size=1,
        expert_parallel_size=1,
        zero_stage=-1,
        precision="fp32",
        num_experts=run.moe.num_experts,
    )
    return PlainEngine(build_model(run), run.optim, layout, torch.device("cpu"))


def train(
    engine: PlainEngine, run: RunConfig, *, steps: int = NUM_STEPS, first_batch: int = 0
) -> list[StepResult]:
    """Train on generated batches at a constant learning rate of 0.01."""
    return [
        train_step(engine, [make_batch(first_batch + step)], run, step=step, learning_rate=1e-2)
        for step in range(steps)
    ]


def pool_load_ratios(run: RunConfig, results: Sequence[StepResult]) -> list[torch.Tensor]:
    """Load over the mean load of the pool, `[layers, experts of the pool]`, for each pool."""
    load_LE = torch.stack([result.assignments_LME.sum(dim=1) for result in results]).sum(dim=0)
    pools = [load_LE[:, pool] for pool in run.moe.pool_slices()]
    return [pool / pool.mean(dim=1, keepdim=True) for pool in pools]


def excess_load(run: RunConfig, results: Sequence[StepResult]) -> float:
    """Largest load over the mean load of its pool, minus 1; the maximum over layers and pools."""
    return max(float(ratios.max()) for ratios in pool_load_ratios(run, results)) - 1.0


def min_load(run: RunConfig, results: Sequence[StepResult]) -> float:
    """Smallest load over the mean load of its pool; the minimum over layers and pools."""
    return min(float(ratios.min()) for ratios in pool_load_ratios(run, results))
