"""Worker of test_checkpoint_layouts.py, run on every rank.

    write   trains two steps in every layout of this world size and saves a checkpoint of each
    read    loads every checkpoint of the folder in every layout of this world size

After loading, the checkpoint is saved again, the next step is made, and rank 0 prints how both
differ from the layout that wrote the checkpoint.
"""

from __future__ import annotations

import argparse
import json
from itertools import chain
from pathlib import Path

import torch

from pretrain.checkpoint import load, load_model_weights, read_meta, save
from pretrain.checkpoint.saved_state import SavedState
from pretrain.config.batch import plan_batch
from pretrain.config.experts import BalanceConfig, MoEConfig
from pretrain.config.schema import (
    BatchConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    PrecisionConfig,
    RunConfig,
    ScheduleConfig,
)
from pretrain.parallel.engine import Engine
from pretrain.parallel.environment import RankEnvironment, rank_environment, stop_process_group
from pretrain.parallel.state_fragments import MOMENTS, VALUE, WEIGHT
from pretrain.parallel.tensor_names import split_name
from pretrain.parity.batches import GlobalBatch
from pretrain.train.build import build_engine
from pretrain.train.step import train_step

PAIRS = 8
MODEL = ModelConfig(
    width=32,
    num_layers=3,
    num_heads=2,
    pool_heads=2,
    ffn_width=48,
    fusion_layer=2,
    image_size=16,
    patch_size=8,
    vocab_size=50,
    context_length=8,
    embed_dim=16,
)


def run_config(profile: str, expert_parallel_size: int, precision: str, pairs: int) -> RunConfig:
    """A run; `pairs` is the micro-batch size. `plain` is the engine of that name."""
    return RunConfig(
        model=MODEL,
        moe=MoEConfig(num_experts=4, expert_width=16, start=1),
        balance=BalanceConfig(bias="sign", bias_rate=0.05, bias_per_modality=True),
        optim=OptimConfig(lr=1e-2),
        schedule=ScheduleConfig(total_steps=100, warmup_steps=0),
        batch=BatchConfig(global_batch_size=PAIRS, micro_batch_size=pairs),
        precision=PrecisionConfig(compute=precision),  # type: ignore[arg-type]
        parallel=ParallelConfig(
            engine="plain" if profile == "plain" else "deepspeed",
            deepspeed="zero1" if profile == "plain" else profile,
            expert_parallel_size=expert_parallel_size,
        ),
    )


def make_engine(cell: str, environment: RankEnvironment) -> tuple[Engine, RunConfig]:
    """The engine of a cell such as `zero1-ep2-fp32`."""
    profile, size, precision = cell.split("-")
    micro = PAIRS // environment.world_size
    run = run_config(profile, int(size.removeprefix("ep")), precision, micro)
    plan = plan_batch(PAIRS, micro, environment.world_size)
    return build_engine(run, environment, plan), run


def step(engine: Engine, run: RunConfig, index: int) -> float:
    """Train one step; returns its loss."""
    size = run.batch.micro_batch_size
    pairs = GlobalBatch(run.model, seed=3, step=index, pairs=PAIRS)
    batch = pairs.rows(engine.communicator.rank * size, size)
    return train_step(engine, [batch], run, step=index, learning_rate=1e-2).losses["total"]


def write(folder: Path, cells: list[str], environment: RankEnvironment) -> None:
    for cell in cells:
        engine, run = make_engine(cell, environment)
        for index in range(2):
            step(engine, run, index)
        root = folder / f"world{environment.world_size}-{cell}"
        path = save(engine, root=root, step=2, state_json={})
        losses = [step(engine, run, index) for index in (2, 3)]
        if engine.communicator.rank == 0:
            (path / "next_losses").write_text(json.dumps(losses))
        engine.close()


def read(folder: Path, out: Path, cells: list[str], environment: RankEnvironment) -> None:
    for cell in cells:
        engine, run = make_engine(cell, environment)
        for root in sorted(folder.iterdir()):
            path = root / "step-00000002"
            load(engine, path)
            again = save(engine, root=out / f"{root.name}-{cell}", step=2, state_json={})
            masters = master_differences(path, engine)  # collective
            # The second one depends on moments and step counts.
            losses = [step(engine, run, index) for index in (2, 3)]
            if engine.communicator.rank == 0:
                expected = json.loads((path / "next_losses").read_text())
                result = {
                    "written": root.name,
                    "read": f"world{environment.world_size}-{cell}",
                    "different": differences(path, again, engine) + masters,
                    "loss": max(abs(a - b) / b for a, b in zip(losses, expected, strict=True)),
                }
                print("RESULT " + json.dumps(result), flush=True)
        engine.close()


def differences(first: Path, second: Path, engine: Engine) -> list[str]:
    """Names of the tensors that differ between two checkpoints, and that do not exist."""
    states = [SavedState(path, read_meta(path)) for path in (first, second)]
    metas = [read_meta(path) for path in (first, second)]
    assert metas[0].parameters.keys() == metas[1].parameters.keys() == engine.shapes().keys()
    buffers = {name for name, _ in engine.model.named_buffers()}
    different = [] if metas[0].parameters == metas[1].parameters else ["shapes or step counts"]
    for name, parameter in metas[0].parameters.items():
        kinds = (VALUE,) if name in buffers else (WEIGHT, *(MOMENTS if parameter.steps else ()))
        numel = torch.Size(parameter.shape).numel()
        for kind in kinds:
            values = [state.read(name, kind, 0, numel) for state in states]
            if not torch.equal(*values):
                different.append(f"{name}/{kind}")
    return different


def master_differences(path: Path, engine: Engine) -> list[str]:
    """Names of the weights that the optimizers of all ranks update to other values than those of
    the checkpoint; a way to the values that does not use fragments. Collective."""
    weights = load_model_weights(path)
    different = []
    for full_name, master in engine.master_weights().items():
        name, experts = split_name(full_name)
        saved = weights[name] if experts is None else weights[name][slice(*experts)]
        if not torch.equal(master, saved):
            different.append(f"rank {engine.communicator.rank}: {full_name}")
    return list(chain.from_iterable(engine.communicator.all_gather_json(different)))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("mode", choices=("write", "read"))
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cells", required=True, help="comma-separated")
    options = parser.parse_args()
    torch.set_num_threads(1)
    environment = rank_environment()
    cells = options.cells.split(",")
    if options.mode == "write":
        write(options.folder, cells, environment)
    else:
        read(options.folder, options.out, cells, environment)
    stop_process_group()


if __name__ == "__main__":
    main()
