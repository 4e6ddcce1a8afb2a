"""Worker of test_skipped_updates.py: a gradient that is not finite, and limits of norm and loss."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))

from layout_worker import PAIRS, make_engine

from pretrain.config.schema import RunConfig
from pretrain.parallel.engine import Engine
from pretrain.parallel.environment import rank_environment, stop_process_group
from pretrain.parity.batches import GlobalBatch
from pretrain.train.step import train_step
from pretrain.train.step_result import NO_LIMITS, StepLimits, StepResult

POISONED = "blocks.1.ffn.experts.w1"


def run_step(
    engine: Engine, run: RunConfig, index: int, limits: StepLimits = NO_LIMITS
) -> StepResult:
    size = run.batch.micro_batch_size
    pairs = GlobalBatch(run.model, seed=3, step=index, pairs=PAIRS)
    batch = pairs.rows(engine.communicator.rank * size, size)
    return train_step(engine, [batch], run, step=index, learning_rate=1e-2, limits=limits)


def poisoned_step(engine: Engine, run: RunConfig) -> StepResult:
    """A step with one gradient that is not finite, on the last rank only."""
    parameter = dict(engine.model.named_parameters())[POISONED]
    is_last = engine.communicator.rank == engine.communicator.world_size - 1

    def poison(gradient: Tensor) -> Tensor:
        changed = gradient.clone()
        changed.view(-1)[0] = math.nan
        return changed if is_last else gradient

    handle = parameter.register_hook(poison)
    try:
        return run_step(engine, run, 2)
    finally:
        handle.remove()


STEPS: dict[str, Callable[[Engine, RunConfig], StepResult]] = {
    "gradient": poisoned_step,
    "norm": lambda engine, run: run_step(engine, run, 2, StepLimits(grad_norm=1e-3)),
    "loss": lambda engine, run: run_step(engine, run, 2, StepLimits(loss=1e-3)),
}


def state(engine: Engine) -> dict[str, Tensor]:
    return {
        f"{fragment.name}#{fragment.start}/{kind}/{fragment.steps}": values.clone()
        for fragment in engine.state_fragments()
        for kind, values in fragment.values.items()
    }


def main() -> None:
    torch.set_num_threads(1)
    environment = rank_environment()
    for cell in sys.argv[1].split(","):
        engine, run = make_engine(cell, environment)
        for index in range(2):
            run_step(engine, run, index)
        before, problems = state(engine), list[str]()
        for name, step in STEPS.items():
            result = step(engine, run)
            after = state(engine)
            changed = [key for key in before if not torch.equal(before[key], after.get(key, key))]
            if before.keys() != after.keys() or changed or result.is_updated:
                problems.append(f"{name}: updated {result.is_updated}, changed {changed[:3]}")
        # The same as if there had been no skipped step.
        result = run_step(engine, run, 2, StepLimits(loss=1e3, grad_norm=1e6))
        if not result.is_updated or not math.isfinite(result.grad_norm):
            problems.append(f"the next step was skipped too: norm {result.grad_norm}")
        gathered = engine.communicator.all_gather_json(problems)
        if environment.rank == 0:
            losses = [result.losses["total"], run_step(engine, run, 3).losses["total"]]
            print("RESULT " + json.dumps({"cell": cell, "problems": gathered, "losses": losses}))
        else:
            run_step(engine, run, 3)
        engine.close()

        reference, run = make_engine(cell, environment)
        losses = [run_step(reference, run, index).losses["total"] for index in range(4)]
        if environment.rank == 0:
            print("EXPECTED " + json.dumps({"cell": cell, "losses": losses[2:]}), flush=True)
        reference.close()
    stop_process_group()


if __name__ == "__main__":
    main()
