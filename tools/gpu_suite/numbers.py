"""Right answers: the layer and a whole training step in bfloat16 against float32, and this device
against the CPU."""

from __future__ import annotations

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
from tools.bench_moe.agreement import off
from tools.bench_moe.shapes import Shape
from tools.gpu_suite.layers import WAYS, build
from tools.gpu_suite.options import Options
from tools.gpu_suite.results import Check, Report, at_most

CPU = torch.device("cpu")
GPU_SHAPE, SMALL_SHAPE = (
    Shape("checked", 1024, 256, 128, 16, 3),
    Shape("checked", 128, 32, 16, 8, 2),
)
FP32, BF16 = 1e-5, 2e-2
STEP_LIMITS = {"device": (1e-4, 1e-3), "bf16": (2e-2, 5e-2)}
"""Of losses and of the gradient norm: this device against the CPU, bfloat16 against float32. A
step's router is not as sure as the layers' above: rounding to bfloat16 sends some tokens to other
experts."""


def layer_numbers(options: Options, report: Report) -> None:
    """Every way of routing: answers, gradients of tokens and weights."""
    shape = GPU_SHAPE if options.on_gpu else SMALL_SHAPE
    for way in WAYS:
        on_cpu = build(way, shape, CPU, torch.float32).run()
        if options.on_gpu:
            _check(
                report,
                f"{way}: float32, GPU against CPU",
                options.device,
                torch.float32,
                way,
                shape,
                on_cpu,
            )
        _check(
            report,
            f"{way}: bfloat16 against float32",
            options.device,
            torch.bfloat16,
            way,
            shape,
            on_cpu,
        )


def _check(
    report: Report,
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    way: str,
    shape: Shape,
    true: dict[str, Tensor],
) -> None:
    """One comparison; what one cannot compute at all does not hide the others."""
    try:
        mine = build(way, shape, device, dtype).run()
    except RuntimeError as error:
        report.add(Check(name=name, passed=False, note=str(error).splitlines()[0]))
        return
    report.add(at_most(name, *_worst(mine, true, FP32 if dtype == torch.float32 else BF16)))


def _worst(
    mine: dict[str, Tensor], true: dict[str, Tensor], limit: float
) -> tuple[float, float, str]:
    if mine.keys() != true.keys():
        return float("inf"), limit, f"gradients of {sorted(mine)} but of {sorted(true)}"
    found = {name: off(mine[name].float().cpu(), true[name].float().cpu()) for name in true}
    name = max(found, key=found.__getitem__)
    return found[name], limit, f"most: {name}"


def step_numbers(options: Options, report: Report) -> None:
    """One optimizer step of a small model, every loss term and the gradient norm; and the weights
    move."""
    exact = _step(options.device, "fp32")
    if options.on_gpu:
        _compare(
            report, "float32, GPU against CPU", exact, _step(CPU, "fp32"), *STEP_LIMITS["device"]
        )
    _compare(
        report,
        "bfloat16 against float32",
        _step(options.device, "bf16"),
        exact,
        *STEP_LIMITS["bf16"],
    )


Facts = tuple[dict[str, float], float, float]
"""Losses, gradient norm, norm of the change of all weights."""


def _compare(
    report: Report, what: str, mine: Facts, true: Facts, loss_limit: float, norm_limit: float
) -> None:
    for name, value in true[0].items():
        # A term that is nearly 0 is judged by the digits it was made of.
        difference = abs(mine[0][name] - value) / max(abs(value), 1e-2)
        report.add(at_most(f"{what}: loss {name}", difference, loss_limit))
    report.add(at_most(f"{what}: gradient norm", abs(mine[1] - true[1]) / true[1], norm_limit))
    report.add(
        at_most(f"{what}: length of the update", abs(mine[2] - true[2]) / true[2], norm_limit)
    )


def _step(device: torch.device, precision: str) -> Facts:
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
    moved = torch.stack([(now.detach() - then).square().sum() for now, then in pairs]).sum().sqrt()
    losses = {
        name: value for name, value in result.losses.items() if not name.startswith("weighted/")
    }
    return losses, result.grad_norm, float(moved)


def synthetic_batch(run: RunConfig, pairs: int) -> Batch:
    """Noise for pictures and numbers for words, the same every time."""
    generator = torch.Generator().manual_seed(5)
    size, columns = run.model.image_size, run.model.context_length
    images = torch.randint(0, 256, (pairs, 3, size, size), generator=generator, dtype=torch.uint8)
    lengths = torch.randint(4, columns + 1, (pairs,), generator=generator)
    ids = torch.randint(4, run.model.vocab_size, (pairs, columns), generator=generator)
    ids = ids * (torch.arange(columns) < lengths.unsqueeze(1))
    rows = torch.arange(pairs)
    return Batch(
        images, ids, lengths, valid_positions(lengths, columns), rows, (), (), (), 0.0, rows, rows
    )
