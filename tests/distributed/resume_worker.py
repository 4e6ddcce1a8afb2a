"""Worker of test_resume.py, run on every rank.

Trains without interruption, then interrupted at given steps and resumed; rank 0 prints the
differences. An interruption is what a stop signal causes: a checkpoint is saved and training ends;
then a new engine, loader and reporter are built from the run folder.
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
from pretrain.parallel.deepspeed_engine import all_gather_json
from pretrain.parallel.environment import stop_process_group
from pretrain.train import loop
from pretrain.train.build import build
from pretrain.train.jsonl import read_rows
from pretrain.train.signals import StopFlag
from pretrain.train.state import TrainState

STEPS = 5


class StopAfter(StopFlag):
    """A stop signal during step number `steps` of this part of the run; never if 0."""

    steps = 0

    @property
    def is_set(self) -> bool:  # type: ignore[override]
        self.num_reads = getattr(self, "num_reads", 0) + 1
        return self.num_reads == self.steps

    @is_set.setter
    def is_set(self, value: bool) -> None:
        pass


def run_config(
    dataset: dict[str, Any], profile: str, precision: str, expert_parallel_size: int
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
        f"model.vocab_size={dataset['vocab_size']}",
        "moe.num_experts=4",
        "moe.expert_width=16",
        f"data.train=[{dataset['folder']}]",
        f"data.tokenizer={dataset['tokenizer']}",
        "data.workers=0",
        "data.augment.affine_degrees=10",
        "batch.global_batch_size=8",
        "batch.micro_batch_size=4",
        f"schedule.total_steps={STEPS}",
        "schedule.warmup_steps=2",
        "log.every_steps=1",
        "log.captions_every_steps=0",
        "checkpoint.every_steps=0",
        f"parallel.deepspeed={profile}",
        f"parallel.expert_parallel_size={expert_parallel_size}",
        f"precision.compute={precision}",
        # Routing with state and randomness, both of which must be resumed: biases, and noise seeded
        # by the step.
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
    """Train one part of a run; returns its state and this rank's tensors."""
    StopAfter.steps = stop_after
    components = build(run, out)
    state = loop.train(components)
    engine = components.engine
    tensors = engine.model_tensors() | engine.optimizer_tensors()
    biases = [buffer for _, buffer in engine.model.named_buffers()]
    assert stop_after or (biases and all(bool(bias.any()) for bias in biases))
    if engine.layout.zero_stage == 3:
        # DeepSpeed does not initialize the padding of stage 3 partitions. The full weights are
        # still compared.
        tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith("/master")}
    return state, {name: tensor.clone() for name, tensor in tensors.items()}


def comparable_rows(out: Path) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl without metrics of time and memory."""
    rows = read_rows(out / "metrics.jsonl")
    kept = ("step", "loss/", "optim/", "moe/", "data/samples_seen")
    return [{key: value for key, value in row.items() if key.startswith(kept)} for row in rows]


def compare(run: RunConfig, out: Path, name: str, cuts: list[int]) -> None:
    """Interrupt a run at each of `cuts`; rank 0 prints one line per cut."""
    uninterrupted = out / f"{name}-uninterrupted"
    expected_state, expected = train(run, uninterrupted, 0)
    for cut in cuts:
        interrupted = out / f"{name}-cut-{cut}"
        first_state, _ = train(run, interrupted, cut)
        state, tensors = train(run, interrupted, 0)
        equal = {
            "stopped_at": first_state.step == cut,
            "state": replace(state, seconds=0.0) == replace(expected_state, seconds=0.0),
            "tensors": expected.keys() == tensors.keys()
            and all(torch.equal(expected[key], tensors[key]) for key in expected),
        }
        if dist.get_rank() == 0:
            rows = comparable_rows(interrupted)
            equal["rows"] = rows == comparable_rows(uninterrupted)
            equal["all_steps"] = [row["step"] for row in rows] == list(range(1, STEPS + 1))
        different = all_gather_json(
            [key for key, is_equal in equal.items() if not is_equal], torch.device("cpu")
        )
        if dist.get_rank() == 0:
            result = {"name": name, "cut": cut, "different": different}
            print("CELL " + json.dumps(result), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--dataset", required=True, help="JSON: folder, tokenizer, vocab_size")
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
        run = run_config(json.loads(options.dataset), profile, precision, expert_parallel_size)
        compare(run, options.out, f"{profile}-{precision}-{expert_parallel_size}", cuts)
    dist.barrier()
    stop_process_group()


if __name__ == "__main__":
    main()
