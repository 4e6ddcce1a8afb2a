"""Worker of test_resume.py, run on every rank.

Trains a run without interruption, then runs that are stopped after given steps and resumed; rank 0
prints which results differ. A run is stopped as by a signal: a checkpoint is saved and training
ends. Then a new engine, loader and reporter are built from the run folder.
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
from pretrain.parallel.communicator import TorchCommunicator
from pretrain.parallel.environment import stop_process_group
from pretrain.train import loop
from pretrain.train.build import build
from pretrain.train.jsonl import read_rows
from pretrain.train.signals import StopFlag
from pretrain.train.state import TrainState

STEPS = 5


class StopAfter(StopFlag):
    """A flag that is set after `num_steps` steps, as by a stop signal; never if 0.

    The training loop reads it once after each step.
    """

    num_steps = 0
    num_reads = 0

    @property
    def is_set(self) -> bool:  # type: ignore[override]
        self.num_reads += 1
        return self.num_reads == self.num_steps

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
    """Start or resume a run; returns its state and this rank's tensors.

    Args:
        run: The run.
        out: Its folder, with a checkpoint if the run is resumed.
        stop_after: Number of steps after which the run is stopped; 0 trains to the end.
    """
    StopAfter.num_steps = stop_after
    components = build(run, out)
    state = loop.train(components)
    engine = components.engine
    tensors = {
        f"{fragment.name}#{fragment.start}/{kind}/{fragment.steps}": values.clone()
        for fragment in engine.state_fragments()
        for kind, values in fragment.values.items()
    }

    if not stop_after:
        biases = [buffer for _, buffer in engine.model.named_buffers()]
        assert biases and all(bool(bias.any()) for bias in biases), "a router bias is still zero"
    return state, tensors


def comparable_rows(out: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl, without metrics that measure time or memory."""
    rows = read_rows(out / "metrics.jsonl")
    prefixes = ("step", "loss/", "optim/", "moe/", "data/samples_seen")
    return [{key: value for key, value in row.items() if key.startswith(prefixes)} for row in rows]


def compare(run: RunConfig, out: Path, name: str, stop_steps: list[int]) -> None:
    """Stop and resume a run after each of `stop_steps`; rank 0 prints one line for each."""
    uninterrupted = out / f"{name}-uninterrupted"
    expected_state, expected_tensors = train(run, uninterrupted, 0)

    for stop_step in stop_steps:
        interrupted = out / f"{name}-stopped-after-{stop_step}"
        first_state, _ = train(run, interrupted, stop_step)
        state, tensors = train(run, interrupted, 0)
        equal = {
            "stop_step": first_state.step == stop_step,
            "state": replace(state, seconds=0.0) == replace(expected_state, seconds=0.0),
            "tensors": expected_tensors.keys() == tensors.keys()
            and all(torch.equal(tensor, tensors[key]) for key, tensor in expected_tensors.items()),
        }
        if dist.get_rank() == 0:
            rows = comparable_rows(interrupted)
            equal["rows"] = rows == comparable_rows(uninterrupted)
            equal["logged_steps"] = [row["step"] for row in rows] == list(range(1, STEPS + 1))

        different = TorchCommunicator(torch.device("cpu")).all_gather_json(
            [key for key, is_equal in equal.items() if not is_equal]
        )
        if dist.get_rank() == 0:
            result = {"name": name, "stop_step": stop_step, "different": different}
            print("RESULT " + json.dumps(result), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--dataset", required=True, help="JSON: folder, tokenizer, vocab_size")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--cases",
        required=True,
        help="JSON list of [profile, precision, expert_parallel_size, [stop step, ...]]",
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    loop.StopFlag = StopAfter  # type: ignore[misc]
    for profile, precision, expert_parallel_size, stop_steps in json.loads(options.cases):
        run = run_config(json.loads(options.dataset), profile, precision, expert_parallel_size)
        compare(run, options.out, f"{profile}-{precision}-{expert_parallel_size}", stop_steps)
    dist.barrier()
    stop_process_group()


if __name__ == "__main__":
    main()
