"""Runs in every rank: trains unbroken, then cut at given steps and resumed; prints what differs
from rank 0.

Called by test_resume.py. A cut is what a stop signal does: a checkpoint, the end, and a new engine,
loader and reporter built from the folder.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from data_pipeline.common.config import apply_overrides, from_mapping
from pretrain.config.schema import RunConfig
from pretrain.parallel.deepspeed_engine import gather_json
from pretrain.parallel.environment import stop_process_group
from pretrain.train import loop
from pretrain.train.build import build
from pretrain.train.journal import read_rows
from pretrain.train.signals import StopFlag
from pretrain.train.state import TrainState

STEPS = 5


class StopAfter(StopFlag):
    """A stop signal that comes during step number `steps` of this part of the run."""

    steps = 0

    @property
    def is_set(self) -> bool:  # type: ignore[override]
        self.asked = getattr(self, "asked", 0) + 1
        return self.asked == self.steps

    @is_set.setter
    def is_set(self, value: bool) -> None:
        pass


def run_config(
    shapes: dict[str, Any], stage: str, precision: str, expert_parallel_size: int
) -> RunConfig:
    overrides = [
        "model.width=32",
        "model.num_layers=3",
        "model.num_heads=2",
        "model.ffn_width=48",
        "model.fusion_layer=2",
        "model.image_size=16",
        "model.patch_size=8",
        "model.context_length=16",
        "model.embed_dim=16",
        "model.pool_heads=2",
        f"model.vocab_size={shapes['vocab_size']}",
        "moe.num_experts=4",
        "moe.expert_width=16",
        f"data.train=[{shapes['folder']}]",
        f"data.tokenizer={shapes['tokenizer']}",
        "data.workers=0",
        "data.augment.affine_degrees=10",
        "batch.global_batch_size=8",
        "batch.micro_batch_size=4",
        f"schedule.total_steps={STEPS}",
        "schedule.warmup_steps=2",
        "log.every_steps=1",
        "log.captions_every_steps=0",
        "checkpoint.every_steps=0",
        f"parallel.deepspeed={stage}",
        f"parallel.expert_parallel_size={expert_parallel_size}",
        f"precision.compute={precision}",
        # Whatever routing remembers or draws must go on too: biases, and numbers that belong to the
        # step.
        "moe.routing=noisy_top_k",
        "moe.capacity_factor=1",
        "moe.capacity_priority=random",
        "moe.capacity_group_size=2",
        "balance.bias=zscore",
        "balance.bias_rate=0.01",
        "balance.bias_per_modality=true",
    ]
    return from_mapping(RunConfig, apply_overrides({}, overrides))


def train(run: RunConfig, out: Path, stop_after: int) -> tuple[TrainState, dict[str, torch.Tensor]]:
    """One part of a run; its state and this rank's weights."""
    StopAfter.steps = stop_after
    parts = build(run, out)
    state = loop.train(parts)
    tensors = parts.engine.model_tensors() | parts.engine.optimizer_tensors()
    biases = [buffer for _, buffer in parts.engine.model.named_buffers()]
    assert stop_after or (biases and all(bool(bias.any()) for bias in biases))
    if parts.engine.layout.zero_stage == 3:
        # DeepSpeed leaves the padding of its stage 3 partitions uninitialized; the whole weights
        # stay compared.
        tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith("/master")}
    return state, {name: tensor.clone() for name, tensor in tensors.items()}


def numbers(out: Path) -> list[dict[str, Any]]:
    """What must be equal bit by bit: everything that is not about time or memory."""
    rows = read_rows(out / "metrics.jsonl")
    kept = ("step", "loss/", "optim/", "moe/", "data/samples_seen")
    return [{key: value for key, value in row.items() if key.startswith(kept)} for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shapes", required=True, help="JSON: folder, tokenizer, vocab_size")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--cells",
        required=True,
        help="JSON rows [profile, precision, expert_parallel_size, [cuts]]",
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    loop.StopFlag = StopAfter  # type: ignore[misc]
    for profile, precision, expert_parallel_size, cuts in json.loads(options.cells):
        run = run_config(json.loads(options.shapes), profile, precision, expert_parallel_size)
        name = f"{profile}-{precision}-{expert_parallel_size}"
        whole = options.out / f"{name}-whole"
        state, tensors = train(run, whole, 0)
        for cut in cuts:
            broken = options.out / f"{name}-cut-{cut}"
            first, _ = train(run, broken, cut)
            second, resumed = train(run, broken, 0)
            same = {
                "stopped_at": first.step == cut,
                "state": replace(second, seconds=0.0) == replace(state, seconds=0.0),
                "tensors": tensors.keys() == resumed.keys()
                and all(torch.equal(tensors[key], resumed[key]) for key in tensors),
                "rows": dist.get_rank() > 0 or numbers(broken) == numbers(whole),
                "all_steps": dist.get_rank() > 0
                or [row["step"] for row in numbers(broken)] == list(range(1, STEPS + 1)),
            }
            wrong = [what for what, equal in same.items() if not equal]
            everyone = gather_json(wrong, torch.device("cpu"))
            if dist.get_rank() == 0:
                print(
                    "CELL " + json.dumps({"name": name, "cut": cut, "different": everyone}),
                    flush=True,
                )
    dist.barrier()
    stop_process_group()


if __name__ == "__main__":
    main()
