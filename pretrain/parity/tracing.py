"""Three optimizer steps of an engine, recorded as named tensors.

A trace maps `STEP/QUANTITY/NAME` to a tensor: `start/parameters/...`, `0/term/balance`,
`0/gradient/blocks.1.ffn.gate.weight`, `2/parameters/...`. Experts that are sharded over ranks
appear as `NAME@first:last`, so the trace of a rank holds its slice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from data_pipeline.order.micro_batches import micro_batch_positions, micro_batches_per_step
from data_pipeline.samples import Batch
from pretrain.config.schema import OptimConfig, RunConfig
from pretrain.model import build_model
from pretrain.model.vision_language import VisionLanguageModel
from pretrain.parallel.engine import Engine
from pretrain.parallel.layout import Layout
from pretrain.parallel.plain_engine import PlainEngine
from pretrain.parity.batches import GlobalBatch
from pretrain.parity.replay import RoutingReplay
from pretrain.train.step import train_step
from pretrain.train.step_result import StepResult

STEPS = 3
WEIGHT_STEPS = (0, STEPS - 1)
"""Steps after which weights are recorded."""

Trace = dict[str, Tensor]
Record = Callable[[str, Tensor], None]
"""Receives the name and the value of each tensor of a trace."""


def trace(
    engine: Engine,
    run: RunConfig,
    missing: Collection[int],
    record: Record,
    replay: RoutingReplay,
) -> None:
    """Train three steps and record them. Collective.

    Args:
        engine: This rank's engine.
        run: Defines how the batch is split.
        missing: Missing rows of the global batch.
        record: Called with every name and tensor, on CPU.
        replay: Records or replaces the expert selections of this rank's model.
    """
    _record_first_gradients(engine, record)
    _record_all(record, "start/parameters", engine.master_weights())
    for step in range(STEPS):
        replay.step = step
        result = train_step(
            engine,
            micro_batches(engine, run, step, missing),
            run,
            step=step,
            learning_rate=learning_rate(run, step),
        )
        _record_all(record, str(step), _step_tensors(result))
        different = torch.tensor(replay.pop_num_different(), device=engine.communicator.device)
        different = engine.communicator.all_reduce_sum(different)
        record(f"{step}/assignments/selected", different.double().cpu())
        if step in WEIGHT_STEPS:
            _record_all(record, f"{step}/parameters", engine.master_weights())


def _record_first_gradients(engine: Engine, record: Record) -> None:
    """Record the gradients of the first optimizer step."""

    def observe(gradients: dict[str, Tensor]) -> None:
        engine.gradient_observer = None
        _record_all(record, "0/gradient", gradients)

    engine.gradient_observer = observe


def _record_all(record: Record, prefix: str, tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        record(f"{prefix}/{name}", tensor.cpu())


def learning_rate(run: RunConfig, step: int) -> float:
    """A different rate at each step, never the run's: detects a rate that is not applied."""
    return run.optim.lr / (step + 2)


def micro_batches(
    engine: Engine, run: RunConfig, step: int, missing: Collection[int]
) -> list[Batch]:
    """This rank's micro-batches of a step, split as the data loader splits the global batch."""
    micro_batch_size, pairs = run.batch.micro_batch_size, run.batch.global_batch_size
    world_size, rank = engine.communicator.world_size, engine.communicator.rank
    global_batch = GlobalBatch(run.model, run.seed, step, pairs, missing)
    batches = []
    for micro in range(micro_batches_per_step(pairs, micro_batch_size, world_size)):
        rows = micro_batch_positions(
            0, micro, rank, micro_batch_size=micro_batch_size, world_size=world_size
        )
        batches.append(global_batch.rows(rows.start, len(rows)))
    return batches


def reference(
    run: RunConfig,
    missing: Collection[int],
    device: torch.device,
    *,
    rounded: bool = False,
    float64: bool = False,
    selections: Trace | None = None,
) -> tuple[Trace, Trace]:
    """One process of plain torch, which accumulates gradients in float32.

    Args:
        run: Run configuration of a case; of its layout only batch sizes and precision are used.
        missing: Missing rows.
        device: Device to train on.
        rounded: The forward pass uses all weights rounded to bfloat16, as with DeepSpeed's ZeRO
            stages 1 to 3 in bfloat16.
        float64: Weights, activations and gradients in float64.
        selections: Use these expert selections; None records the run's own.

    Returns:
        The trace, and the expert selections (`RoutingReplay.selections`).
    """
    layout = Layout(
        world_size=1,
        expert_parallel_size=1,
        zero_stage=-1,
        precision=run.precision.compute,
        num_experts=run.moe.num_experts,
    )
    model = build_model(run)

    if not float64:
        engine_class = _RoundedEngine if rounded else PlainEngine
        return _traced(engine_class(model, run.optim, layout, device), run, missing, selections)

    model.compute_dtype = torch.float64
    with _KeepFloat64():
        engine = PlainEngine(model.double(), run.optim, layout, device)
        return _traced(engine, run, missing, selections)


def _traced(
    engine: PlainEngine, run: RunConfig, missing: Collection[int], selections: Trace | None
) -> tuple[Trace, Trace]:
    tensors, replay = Trace(), RoutingReplay(engine.model, selections)
    trace(engine, run, missing, tensors.__setitem__, replay)
    return tensors, replay.selections


class _RoundedEngine(PlainEngine):
    """Computes with weights rounded to bfloat16 and updates unrounded master weights.

    The initial master weights are rounded too, as in DeepSpeed.
    """

    def __init__(
        self, model: VisionLanguageModel, optim: OptimConfig, layout: Layout, device: torch.device
    ) -> None:
        super().__init__(model, optim, layout, device)
        # Twice: the second call stores the rounded weights as masters.
        self._round()
        self._round()

    def step(self, learning_rate: float, *, norm_limit: float = math.inf) -> float:
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(self.masters[name])
        norm = super().step(learning_rate, norm_limit=norm_limit)
        self._round()
        return norm

    def master_weights(self) -> dict[str, Tensor]:
        return {self._name(name): m.to("cpu", copy=True) for name, m in self.masters.items()}

    def _round(self) -> None:
        self.masters = {
            name: weight.detach().clone() for name, weight in self.model.named_parameters()
        }
        with torch.no_grad():
            for weight in self.model.parameters():
                weight.copy_(weight.bfloat16())


def _step_tensors(result: StepResult) -> Trace:
    """The results of a step by quantity and name, float64."""
    numbers = {
        f"loss/{name}" if name == "total" else f"term/{name}": value
        for name, value in result.losses.items()
    }
    numbers |= {
        "norm/norm": result.grad_norm,
        "term/logit_scale": result.logit_scale,
        "counts/pairs": result.pairs,
    }
    router = result.router
    tensors = {
        "counts/tokens": result.tokens_M,
        "loads/experts": router.assignments_ME,
        "assignments/kept": router.kept_ME,
        "assignments/top1": router.top1_ME,
        "statistics/probability": router.prob_sum_ME,
        "statistics/load": router.load_sum_ME,
        "statistics/z": router.z_sum_M,
        "statistics/entropy": router.entropy_sum_M,
        "statistics/top_probability": router.top1_prob_sum_M,
        "biases/biases": result.biases,
    }
    named = {name: torch.tensor(value, dtype=torch.float64) for name, value in numbers.items()}
    return named | {name: tensor.double() for name, tensor in tensors.items()}


class _KeepFloat64(TorchFunctionMode):
    """`x.float()` returns a float64 tensor unchanged: the model uses it for "at least float32"."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is Tensor.float and args[0].dtype == torch.float64:
            return args[0]
        return func(*args, **(kwargs or {}))
