"""Numerics of the MoE layer and of a training step: bfloat16 against float32, GPU against CPU."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from data_pipeline.samples import Batch
from pretrain.config.presets import load_run
from pretrain.config.schema import RunConfig
from pretrain.model import build_model
from pretrain.model.vision_language import valid_positions
from pretrain.parallel.layout import Layout
from pretrain.parallel.plain_engine import PlainEngine
from pretrain.train.step import train_step
from tools.bench_moe.reference import relative_error
from tools.bench_moe.shapes import Shape
from tools.gpu_suite.layer_cases import ROUTING_CASES, build
from tools.gpu_suite.options import Options
from tools.gpu_suite.results import Check, Report, check_at_most

CPU = torch.device("cpu")
GPU_SHAPE = Shape("checked", 1024, 256, 128, 16, 3)
SMALL_SHAPE = Shape("checked", 128, 32, 16, 8, 2)
LAYER_TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""Relative error of each tensor."""


class StepTolerance(NamedTuple):
    """Relative tolerances of one training step."""

    loss: float
    norm: float
    """For the gradient norm and the norm of the update."""


# In the model, unlike in the layer cases above, rounding to bfloat16 changes some assignments.
STEP_TOLERANCES = {"device": StepTolerance(1e-4, 1e-3), "bf16": StepTolerance(2e-2, 5e-2)}


class StepMetrics(NamedTuple):
    """Metrics of one training step."""

    losses: dict[str, float]
    grad_norm: float
    update_norm: float
    """Norm of the change of all weights."""


def check_layer(options: Options, report: Report) -> None:
    """Compare output and gradients of the layer in every routing case."""
    shape = GPU_SHAPE if options.on_gpu else SMALL_SHAPE
    for case in ROUTING_CASES:
        reference = build(case, shape, CPU, torch.float32).run()
        if options.on_gpu:
            name = f"{case}: float32, GPU against CPU"
            report.add(
                compare_case(name, case, shape, options.device, torch.float32, reference=reference)
            )
        name = f"{case}: bfloat16 against float32"
        report.add(
            compare_case(name, case, shape, options.device, torch.bfloat16, reference=reference)
        )


def compare_case(
    name: str,
    case: str,
    shape: Shape,
    device: torch.device,
    dtype: torch.dtype,
    *,
    reference: dict[str, Tensor],
) -> Check:
    """Compare one routing case with the reference; an exception fails only this check."""
    try:
        tensors = build(case, shape, device, dtype).run()
    except RuntimeError as error:
        return Check(name=name, passed=False, note=str(error).splitlines()[0])

    tolerance = LAYER_TOLERANCES[dtype]
    if tensors.keys() != reference.keys():
        note = f"tensors {sorted(tensors)}, expected {sorted(reference)}"
        return check_at_most(name, float("inf"), tolerance, note)
    errors = {
        key: relative_error(tensors[key].float().cpu(), reference[key].float().cpu())
        for key in reference
    }
    worst = max(errors, key=errors.__getitem__)
    return check_at_most(name, errors[worst], tolerance, f"largest: {worst}")


def check_step(options: Options, report: Report) -> None:
    """Compare losses, gradient norm and update norm of one step of a small model."""
    float32 = run_step(options.device, "fp32")
    if options.on_gpu:
        report.add(
            *_compare_steps(
                "float32, GPU against CPU",
                float32,
                run_step(CPU, "fp32"),
                STEP_TOLERANCES["device"],
            )
        )
    report.add(
        *_compare_steps(
            "bfloat16 against float32",
            run_step(options.device, "bf16"),
            float32,
            STEP_TOLERANCES["bf16"],
        )
    )


def _compare_steps(
    name: str, actual: StepMetrics, expected: StepMetrics, tolerance: StepTolerance
) -> list[Check]:
    checks = []
    for term, value in expected.losses.items():
        # For a loss near 0 the error is absolute, because its terms are of order 1.
        error = abs(actual.losses[term] - value) / max(abs(value), 1e-2)
        checks.append(check_at_most(f"{name}: loss {term}", error, tolerance.loss))
    for norm, value, reference in (
        ("gradient norm", actual.grad_norm, expected.grad_norm),
        ("update norm", actual.update_norm, expected.update_norm),
    ):
        error = abs(value - reference) / reference
        checks.append(check_at_most(f"{name}: {norm}", error, tolerance.norm))
    return checks


def run_step(device: torch.device, precision: str) -> StepMetrics:
    """Run one optimizer step of a small model on synthetic data."""
    run = load_run(
        "tiny",
        [
            f"precision.compute={precision}",
            "model.vocab_size=512",
            "batch.global_batch_size=16",
            "batch.micro_batch_size=16",
            "balance.importance_weight=0.01",
        ],
    )
    layout = Layout(
        world_size=1,
        expert_parallel_size=1,
        zero_stage=-1,
        precision=precision,
        num_experts=run.moe.num_experts,
    )
    engine = PlainEngine(build_model(run), run.optim, layout, device)
    before = [parameter.detach().clone() for parameter in engine.model.parameters()]
    result = train_step(engine, [synthetic_batch(run, 16)], run, step=0, learning_rate=1e-3)

    pairs = zip(engine.model.parameters(), before, strict=True)
    squares = [(new.detach() - old).square().sum() for new, old in pairs]
    losses = {
        name: value for name, value in result.losses.items() if not name.startswith("weighted/")
    }
    return StepMetrics(losses, result.grad_norm, float(torch.stack(squares).sum().sqrt()))


def synthetic_batch(run: RunConfig, pairs: int) -> Batch:
    """A batch of random pixels and token ids, the same on every call."""
    generator = torch.Generator().manual_seed(5)
    size, columns = run.model.image_size, run.model.context_length
    images = torch.randint(0, 256, (pairs, 3, size, size), generator=generator, dtype=torch.uint8)
    lengths = torch.randint(4, columns + 1, (pairs,), generator=generator)
    ids = torch.randint(4, run.model.vocab_size, (pairs, columns), generator=generator)
    ids = ids * (torch.arange(columns) < lengths.unsqueeze(1))
    rows = torch.arange(pairs)
    return Batch(
        images=images,
        text_ids=ids,
        text_lengths=lengths,
        text_positions=valid_positions(lengths, columns),
        caption_hashes=rows,
        keys=(),
        captions=(),
        problems=(),
        seconds=0.0,
        ids=rows,
        slots=rows,
    )
