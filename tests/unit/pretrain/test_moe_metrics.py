"""Metrics of the routing: biases, loads within a pool, dropped tokens, and sampled routing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from data_pipeline.order.state import LoaderState
from pretrain.train.layer_metrics import router_metrics
from pretrain.train.metrics import SourceSize, Window
from pretrain.train.state import TrainState
from pretrain.train.step import train_step
from tests.support.moe_training import NUM_STEPS, make_batch, make_engine, small_run


def test_sampled_assignments_depend_on_the_step(tmp_path: Path) -> None:
    """Equal weights and batches give equal assignments in the same step, others in another step."""
    run = small_run(tmp_path, "tiny", "moe.routing=sampled")
    first, repeated, other = (
        train_step(make_engine(run), [make_batch(0)], run, step=step, learning_rate=0.0)
        for step in (3, 3, 4)
    )
    assert torch.equal(first.assignments_LME, repeated.assignments_LME)
    assert not torch.equal(first.assignments_LME, other.assignments_LME)


def test_bias_range(tmp_path: Path) -> None:
    run = small_run(tmp_path, "[tiny, ours]", "balance.bias_rate=0.5")
    engine = make_engine(run)
    result = train_step(engine, [make_batch(0)], run, step=0, learning_rate=0.0)
    load_E = result.assignments_LME[1, 1]
    expected = 0.5 * float((load_E.max() - load_E.min()) / load_E.std(correction=0))
    metrics = router_metrics(result, run, 1, 1)
    assert metrics is not None and metrics.bias_range == pytest.approx(expected, rel=1e-4)

    frozen = train_step(engine, [make_batch(0)], run, step=NUM_STEPS - 1, learning_rate=0.0)
    assert torch.equal(frozen.biases, result.biases)


def test_load_ratios_are_relative_to_the_pool(tmp_path: Path) -> None:
    """There are more patches than text tokens, so experts are compared within their pool."""
    run = small_run(tmp_path, "[tiny, vl_moe]", "moe.image_experts=2")
    window = Window(run, 1, torch.device("cpu"), [SourceSize("web", 1)])
    result = train_step(make_engine(run), [make_batch(0)], run, step=0, learning_rate=0.0)
    # Experts 0 and 1 process patches, the other six text.
    load_ME = torch.tensor([[300, 100, 0, 0, 0, 0, 0, 0], [0, 0, 20, 10, 10, 10, 10, 0]]).double()
    router = result.router._replace(assignments_ME=load_ME.expand(2, 2, 8))
    window.add(result._replace(router=router), 0.0, [])
    entry = window.entry(
        TrainState(loader=LoaderState()),
        [window.rank_report()],
        learning_rate=1e-3,
        consumed=[],
        corrupt={},
    )
    first, second = entry.layers
    assert first.max_over_mean_load == pytest.approx(2.0)
    assert first.min_over_mean_load == 0.0
    assert second.modalities["image"].max_over_mean_load == pytest.approx(1.5)
    assert second.modalities["text"].max_over_mean_load == pytest.approx(2.0)


def test_dropped_assignments(tmp_path: Path) -> None:
    run = small_run(tmp_path, "[tiny, switch]", "moe.capacity_factor=0.5")
    engine = make_engine(run)
    result = train_step(engine, [make_batch(0)], run, step=0, learning_rate=0.0, coactivation=True)
    image, text = router_metrics(result, run, 0, 0), router_metrics(result, run, 1, 1)
    assert image is not None and text is not None
    kept_LME, assignments_LME = result.router.kept_ME, result.router.assignments_ME
    dropped = 1 - float(kept_LME[0, 0].sum() / assignments_LME[0, 0].sum())
    assert image.dropped == pytest.approx(dropped)
    assert image.dropped is not None and image.dropped > 0.3

    top1_ratio = float(result.router.top1_ME[1, 1].max() / result.tokens_M[1])
    assert text.top1_ratio == pytest.approx(top1_ratio)
    diagonal_LE = result.router.coactivation_EE.diagonal(dim1=1, dim2=2)
    assert torch.equal(diagonal_LE, kept_LME.sum(dim=1))
