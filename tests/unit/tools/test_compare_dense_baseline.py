"""Comparison of a sparse run with its dense baseline, with two real training runs of two steps."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pretrain.config.presets import load_run
from pretrain.train.loop import is_routing_logged
from pretrain.train.run import train_command
from tests.support.shape_dataset import ShapeDataset, make_shape_dataset
from tools.balancing_study import columns, report
from tools.compare_dense_baseline import comparison, main, make_trials
from tools.study import seed_means
from tools.study.trials import run_trials

SMALL = [
    "model={width: 32, num_layers: 3, num_heads: 2, pool_heads: 2, ffn_width: 32, fusion_layer: 1, "
    "patch_size: 16, context_length: 16, embed_dim: 16}",
    "moe={num_experts: 4, expert_width: 16}",
    "data.workers=0",
    "batch={global_batch_size: 16, micro_batch_size: 8}",
    "optim.lr=1e-3",
    "log.every_steps=1",
    "eval.batch_size=32",
    "eval.caption_samples=4",
]


def fake_result(seed: int, loss: float) -> dict[str, Any]:
    """A result as `evaluate_run` returns it, with the values that the table needs."""
    return {
        "seed": seed,
        "pairs": 10,
        "steps": 2,
        "seconds": 1.0,
        "kilo_parameters": 1.0,
        "eval": {},
        "kilo_active_parameters": 1.0,
        "mega_flops_per_pair": 1.0,
        "routing": None,
        "loss": {"main": loss, "contrastive": loss, "caption": 0.0},
    }


def table_cells(line: str) -> list[str]:
    """Cells of a row, without the label."""
    return [cell.strip() for cell in line.split("|")[2:-1]]


def test_difference_is_sparse_minus_dense() -> None:
    sparse = [fake_result(0, 1.0), fake_result(1, 2.0)]
    dense = [fake_result(0, 1.5), fake_result(1, 2.7)]
    header, _, first, *_ = comparison(sparse, dense).splitlines()
    assert table_cells(header) == ["sparse", "dense baseline", "sparse - dense"]
    assert table_cells(first) == ["1.5000 ± 0.7071", "2.1000 ± 0.8485", "-0.6000 ± 0.1414"]


def test_trials_and_text_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    settings = [
        "data.train=[x]",
        "data.tokenizer=x",
        "model.context_length=12",
        "moe.router_input=caption",
        "moe.num_experts=64",
    ]

    def trials(text_tokens: float | None) -> Any:
        return make_trials("quickstart", settings, seeds=[4, 5], steps=50, text_tokens=text_tokens)

    assert [trial.folder for trial in trials(1000.0)] == [
        "sparse-seed4",
        "dense-seed4",
        "sparse-seed5",
        "dense-seed5",
    ]
    # Values above context_length, such as the default, are reduced to it.
    assert trials(1000.0) == trials(12.0) == trials(None)
    assert trials(1000.0) != trials(1.0)
    assert main(["--text-tokens", "-4", *settings]) == 2
    assert "--text-tokens is -4" in capsys.readouterr().err


def test_steps_with_routing_images() -> None:
    run = load_run("tiny", ["log.routing_every_steps=300", "schedule.total_steps=700"])
    assert [step for step in range(1, 701) if is_routing_logged(run, step)] == [300, 600, 700]
    assert not is_routing_logged(replace(run, log=replace(run.log, routing_every_steps=0)), 700)
    assert not is_routing_logged(replace(run, moe=replace(run.moe, stop=0)), 700)


def test_both_models_are_trained_and_compared(tmp_path: Path, shapes: ShapeDataset) -> None:
    held_out = make_shape_dataset(tmp_path / "held", pairs=24)
    settings = [
        *SMALL,
        *shapes.overrides,
        f"eval.sets=[{{name: held, shards: {held_out.folder}}}]",
        "log.routing_every_steps=2",
    ]
    trials = make_trials("tiny", settings, seeds=[3], steps=2, text_tokens=8)
    results = run_trials(trials, tmp_path, train=train_command)
    sparse, dense = results["sparse"][0], results["dense"][0]
    for key in ("pairs", "steps", "seed"):
        assert sparse[key] == dense[key]
    assert dense["routing"] is None and sparse["routing"]["experts"] == 8
    assert dense["mega_flops_per_pair"] == pytest.approx(sparse["mega_flops_per_pair"], rel=0.01)
    assert json.loads((tmp_path / "dense-seed3" / "result.json").read_text()) == dense

    table = comparison(results["sparse"], results["dense"])
    assert "held: image to text R@1" in table
    assert "32 pairs in 2 steps" in table

    study_columns = columns(trials[0].run)
    missing = [c.header for c in study_columns if seed_means.lookup(sparse, c.path) is None]
    assert missing == []
    assert study_columns[1].path == ("eval", "held", "image_to_text/R@1")
    assert report({"none": [sparse], "dense": [dense]}, trials[0].run).count("\n| ") == 3

    images = {name: image_steps(tmp_path / f"{name}-seed3") for name in ("sparse", "dense")}
    assert images == {"sparse": {"moe/load": [2], "moe/coactivation": [2]}, "dense": {}}


def image_steps(run_dir: Path) -> dict[str, list[int]]:
    """Steps of each image in TensorBoard, by tag."""
    events = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"images": 0}).Reload()
    return {name: [image.step for image in events.Images(name)] for name in events.Tags()["images"]}
