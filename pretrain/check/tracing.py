"""Three optimizer steps of an engine, written down as named tensors.

A trace is a mapping from `STEP/QUANTITY/NAME` to a tensor: `start/parameters/...`,
`0/term/balance`, `0/gradient/blocks.1.ffn.gate.weight`, `2/parameters/...`. Experts that are split
over ranks appear as `NAME@first:last`, so a rank's trace holds its slice.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from data_pipeline.samples import Batch
from pretrain.check.batches import GlobalBatch
from pretrain.config.schema import BatchConfig, OptimConfig, RunConfig
from pretrain.model import build_model
from pretrain.model.vision_language import VisionLanguageModel
from pretrain.parallel.engine import TrainEngine
from pretrain.parallel.layout import Layout
from pretrain.parallel.masters import master_weights
from pretrain.parallel.plain_engine import PlainEngine
from pretrain.train.step import StepResult, train_step

STEPS = 3
KEPT = (0, STEPS - 1)
"""Steps after which the weights are written down."""

Trace = dict[str, Tensor]


Write = Callable[[str, Tensor], None]


def trace(engine: TrainEngine, run: RunConfig, missing: Collection[int], write: Write) -> None:
    """Train three steps and write down what happens. Collective.

    Args:
        engine: Of this rank.
        run: Says how the batch is split.
        missing: Bad rows of the global batch.
        write: Gets every name and tensor, on CPU.
    """
    take_step, gradients_wanted = engine.step, [True]

    def write_gradients_and_step(rate: float) -> float:
        if gradients_wanted:
            gradients_wanted.clear()
            _write_all(write, "0/gradient", engine.gradients())
        return take_step(rate)

    engine.step = write_gradients_and_step  # type: ignore[method-assign, assignment]
    _write_all(write, "start/parameters", _weights(engine))
    for step in range(STEPS):
        result = train_step(
            engine,
            micro_batches(engine, run, step, missing),
            run,
            step=step,
            learning_rate=learning_rate(run, step),
        )
        _write_all(write, str(step), _facts(result))
        if step in KEPT:
            _write_all(write, f"{step}/parameters", _weights(engine))


def _write_all(write: Write, head: str, tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        write(f"{head}/{name}", tensor.cpu())


def _weights(engine: TrainEngine) -> Trace:
    return (
        engine.masters_by_file_name()
        if isinstance(engine, _RoundedEngine)
        else master_weights(engine)
    )


def learning_rate(run: RunConfig, step: int) -> float:
    """Another rate at each step, none of them the run's own: it must reach the optimizer."""
    return run.optim.lr / (step + 2)


def micro_batches(
    engine: TrainEngine, run: RunConfig, step: int, missing: Collection[int]
) -> list[Batch]:
    """This rank's micro-batches of a step, cut as the loader cuts the global batch."""
    per_forward, pairs = run.batch.micro_batch_size, run.batch.global_batch_size
    whole = GlobalBatch(run.model, run.seed, step, pairs, missing)
    per_round = per_forward * engine.world_size
    return [
        whole.rows(first + engine.rank * per_forward, per_forward)
        for first in range(0, pairs, per_round)
    ]


def reference(
    run: RunConfig,
    missing: Collection[int],
    device: torch.device,
    *,
    rounded: bool = False,
    float64: bool = False,
) -> Trace:
    """The trace of one process of plain torch with the whole batch in one forward pass.

    Args:
        run: A cell's run; of its layout only batch size and number format matter. Activations are
            computed again only where `model.activation_checkpointing` says so.
        missing: Bad rows.
        device: Where to train.
        rounded: The forward pass reads all weights rounded to bfloat16, as it does with DeepSpeed's
            ZeRO stages 1 to 3 in bfloat16.
        float64: Weights, activations and gradients in float64.
    """
    pairs = run.batch.global_batch_size
    run_alone = replace(run, batch=BatchConfig(global_batch_size=pairs, micro_batch_size=pairs))
    layout = Layout(
        world_size=1,
        expert_parallel_size=1,
        zero_stage=-1,
        precision=run.precision.compute,
        num_experts=run.moe.num_experts,
    )
    model, found = build_model(run_alone), Trace()
    if not float64:
        kind = _RoundedEngine if rounded else PlainEngine
        trace(kind(model, run.optim, layout, device), run_alone, missing, found.__setitem__)
        return found
    model.compute_dtype = torch.float64
    with _KeepFloat64():
        trace(
            PlainEngine(model.double(), run.optim, layout, device),
            run_alone,
            missing,
            found.__setitem__,
        )
    return found


class _RoundedEngine(PlainEngine):
    """Computes with weights rounded to bfloat16 and updates unrounded ones, which begin as rounded
    ones do."""

    def __init__(
        self, model: VisionLanguageModel, optim: OptimConfig, layout: Layout, device: torch.device
    ) -> None:
        super().__init__(model, optim, layout, device)
        self._round()
        self._round()

    def step(self, learning_rate: float) -> float:
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(self.masters[name])
        norm = super().step(learning_rate)
        self._round()
        return norm

    def masters_by_file_name(self) -> dict[str, Tensor]:
        """The unrounded weights, named as in files."""
        names = zip(self.model_tensors(), self.model.named_parameters(), strict=False)
        return {
            file_name: self.masters[name].to("cpu", copy=True) for file_name, (name, _) in names
        }

    def _round(self) -> None:
        self.masters = {
            name: weight.detach().clone() for name, weight in self.model.named_parameters()
        }
        with torch.no_grad():
            for weight in self.model.parameters():
                weight.copy_(weight.bfloat16())


def _facts(result: StepResult) -> Trace:
    """What a step returned, by quantity and name; float64."""
    numbers = {
        f"loss/{name}" if name == "total" else f"term/{name}": v
        for name, v in result.losses.items()
    }
    numbers |= {
        "norm/norm": result.grad_norm,
        "term/logit_scale": result.logit_scale,
        "counts/pairs": result.pairs,
    }
    router = result.router
    tensors = {
        "counts/tokens": result.tokens_M,
        "choices/chosen": router.choices_ME,
        "choices/kept": router.kept_ME,
        "choices/best": router.first_ME,
        "statistics/probability": router.prob_sum_ME,
        "statistics/load": router.load_sum_ME,
        "statistics/z": router.z_sum_M,
        "statistics/entropy": router.entropy_sum_M,
        "statistics/top_probability": router.top_sum_M,
        "biases/biases": result.biases,
    }
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in numbers.items()} | {
        name: tensor.double() for name, tensor in tensors.items()
    }


class _KeepFloat64(TorchFunctionMode):
    """`x.float()` leaves float64 as it is: there it is meant as "at least float32"."""

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
