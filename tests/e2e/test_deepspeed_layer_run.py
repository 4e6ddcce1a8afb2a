"""Runs with DeepSpeed's own MoE layer: training, resuming, and errors if the layer changes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pretrain.evaluate.trained_model import load_trained_model
from pretrain.train.jsonl import read_rows
from tests.support.launch import run_ranks
from tests.support.shape_dataset import make_shape_dataset

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]

SETTINGS = """
    model.width=32 model.num_heads=2 model.num_layers=2 model.fusion_layer=1 model.ffn_width=32
    model.embed_dim=16 model.pool_heads=2 model.patch_size=16 model.context_length=16
    moe.expert_width=16 batch.global_batch_size=8 batch.micro_batch_size=4
    schedule.warmup_steps=0 schedule.kind=constant data.workers=0
    log.captions_every_steps=0 log.every_steps=1 checkpoint.every_steps=3
""".split()
DEEPSPEED_LAYER = "moe.backend=deepspeed"


def losses(run_dir: Path) -> list[float]:
    return [row["loss/total"] for row in read_rows(run_dir / "metrics.jsonl")]


@pytest.mark.parametrize(
    ("processes", "layout"), [(1, []), (2, ["parallel.expert_parallel_size=2"])]
)
def test_training_and_resuming(processes: int, layout: list[str], tmp_path: Path) -> None:
    shapes = make_shape_dataset(tmp_path / "shapes", pairs=32, samples_per_shard=8)
    deepspeed_run, builtin_run = tmp_path / "deepspeed", tmp_path / "builtin"

    def train(run_dir: Path, steps: int, *overrides: str) -> tuple[int, str]:
        """Exit status and output."""
        command = ["-m", "pretrain", "train", "tiny", "--out", str(run_dir)]
        settings = [*SETTINGS, *shapes.overrides, *layout, f"schedule.total_steps={steps}"]
        arguments = [*command, *settings, *overrides]
        done = run_ranks(arguments, processes=processes, timeout_seconds=100)
        return max(done.returncodes), done.output

    status, output = train(deepspeed_run, 3, DEEPSPEED_LAYER)
    assert status == 0, output
    status, output = train(deepspeed_run, 6, DEEPSPEED_LAYER)
    assert status == 0 and "resumed from" in output, output
    status, output = train(builtin_run, 6)
    assert status == 0, output

    # The layers have equal initial weights and compute the same function; one run was resumed.
    assert losses(deepspeed_run) == pytest.approx(losses(builtin_run), rel=1e-4)
    cpu = torch.device("cpu")
    deepspeed_model = load_trained_model(deepspeed_run, device=cpu).model
    builtin_weights = dict(load_trained_model(builtin_run, device=cpu).model.named_parameters())
    for name, weight in deepspeed_model.named_parameters():
        torch.testing.assert_close(weight, builtin_weights[name], rtol=1e-3, atol=1e-4)

    if processes == 1:
        # The optimizer shards of the two layers order the weights differently.
        status, output = train(builtin_run, 9, DEEPSPEED_LAYER)
        assert status != 0 and "moe.backend=auto" in output
        status, output = train(deepspeed_run, 9)
        assert status != 0 and "moe.backend=deepspeed" in output
