"""Runs with DeepSpeed's own MoE layer: training, resuming, evaluation, and no mixing of layers."""

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
NATIVE = "moe.backend=deepspeed"


def losses(run_dir: Path) -> list[float]:
    return [row["loss/total"] for row in read_rows(run_dir / "metrics.jsonl")]


@pytest.mark.parametrize(
    ("processes", "layout"), [(1, []), (2, ["parallel.expert_parallel_size=2"])]
)
def test_training_and_resuming(processes: int, layout: list[str], tmp_path: Path) -> None:
    shapes = make_shape_dataset(tmp_path / "shapes", pairs=32, samples_per_shard=8)
    native, ours = tmp_path / "native", tmp_path / "ours"

    def train(run_dir: Path, steps: int, *overrides: str) -> tuple[int, str]:
        """Exit status and output."""
        command = ["-m", "pretrain", "train", "tiny", "--out", str(run_dir)]
        settings = [*SETTINGS, *shapes.overrides, *layout, f"schedule.total_steps={steps}"]
        arguments = [*command, *settings, *overrides]
        done = run_ranks(arguments, processes=processes, timeout_seconds=100)
        return max(done.returncodes), done.output

    status, output = train(native, 3, NATIVE)
    assert status == 0, output
    status, output = train(native, 6, NATIVE)
    assert status == 0 and "resumed from" in output, output
    status, output = train(ours, 6)
    assert status == 0, output

    # Equal initial values and equal mathematics, in one run or in two parts.
    assert losses(native) == pytest.approx(losses(ours), rel=1e-4)
    cpu = torch.device("cpu")
    native_model = load_trained_model(native, device=cpu).model
    our_weights = dict(load_trained_model(ours, device=cpu).model.named_parameters())
    for name, weight in native_model.named_parameters():
        torch.testing.assert_close(weight, our_weights[name], rtol=1e-3, atol=1e-4)

    if processes == 1:
        # The optimizer shards of the two layers order the weights differently.
        status, output = train(ours, 9, NATIVE)
        assert status != 0 and "moe.backend=auto" in output
        status, output = train(native, 9)
        assert status != 0 and "moe.backend=deepspeed" in output
