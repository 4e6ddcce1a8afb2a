"""A run with DeepSpeed's own MoE layer: trains, goes on, and is judged like any other; never mixed
up with ours."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pretrain.evaluate.trained import load_trained
from pretrain.train.journal import read_rows
from tests.support.launch import run_ranks
from tests.support.shards import make_shapes

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]

SMALL = [
    "model.width=32",
    "model.num_heads=2",
    "model.num_layers=2",
    "model.fusion_layer=1",
    "model.ffn_width=32",
    "model.embed_dim=16",
    "model.pool_heads=2",
    "model.patch_size=16",
    "model.context_length=16",
    "moe.expert_width=16",
    "batch.global_batch_size=8",
    "batch.micro_batch_size=4",
    "schedule.warmup_steps=0",
    "schedule.kind=constant",
    "data.workers=0",
    "log.captions_every_steps=0",
    "log.every_steps=1",
    "checkpoint.every_steps=3",
]


def losses(out: Path) -> list[float]:
    return [row["loss/total"] for row in read_rows(out / "metrics.jsonl")]


@pytest.mark.parametrize(
    ("processes", "extra"), [(1, []), (2, ["parallel.expert_parallel_size=2"])]
)
def test_it_trains_and_goes_on(processes: int, extra: list[str], tmp_path: Path) -> None:
    shapes = make_shapes(tmp_path / "shapes", pairs=32, samples_per_shard=8)

    def train(out: str, steps: int, *words: str) -> str:
        arguments = [
            "-m",
            "pretrain",
            "train",
            "tiny",
            "--out",
            str(tmp_path / out),
            *SMALL,
            *shapes.overrides,
            *extra,
            f"schedule.total_steps={steps}",
            *words,
        ]
        done = run_ranks(arguments, processes=processes, timeout_seconds=100)
        return done.output + f"\nexit {max(done.returncodes)}"

    native = "moe.backend=deepspeed"
    assert "exit 0" in train("theirs", 3, native)
    text = train("theirs", 6, native)
    assert "exit 0" in text and "resumed from" in text
    assert "exit 0" in train("ours", 6)
    # The same first values, the same mathematics, whole or in two parts.
    assert losses(tmp_path / "theirs") == pytest.approx(losses(tmp_path / "ours"), rel=1e-4)

    one, other = (
        load_trained(tmp_path / out, device=torch.device("cpu")).model for out in ("theirs", "ours")
    )
    weights = dict(other.named_parameters())
    for name, weight in one.named_parameters():
        torch.testing.assert_close(weight, weights[name], rtol=1e-3, atol=1e-4)

    if processes == 1:
        # Shards of the optimizer hold the weights in another order: taking them would be silent
        # nonsense.
        text = train("ours", 9, native)
        assert "moe.backend=auto" in text and "exit 0" not in text
        text = train("theirs", 9)
        assert "moe.backend=deepspeed" in text and "exit 0" not in text
