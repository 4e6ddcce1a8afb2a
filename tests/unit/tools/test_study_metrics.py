"""Metrics of a study's runs and its tables, compared with values computed by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from pretrain.config.experts import MoEConfig
from pretrain.config.schema import ModelConfig, RunConfig
from pretrain.train.log_entry import LogEntry, Losses
from tests.support.log_entries import layer, log_entry
from tools.study import run_metrics, seed_means

RUN = RunConfig(model=ModelConfig(num_layers=3), moe=MoEConfig(num_experts=4))


def metrics_row(contrastive: float = 1.0) -> LogEntry:
    """The log entry of a run with two sparse layers of four experts."""
    return log_entry(
        losses=Losses(
            total=5.0,
            terms={"contrastive": contrastive, "caption": 2.0},
            weighted={"contrastive": 1.0, "caption": 4.0},
        ),
        layers=(
            layer(1, {"image": [10, 10, 20, 0], "text": [4, 4, 4, 4]}),
            layer(2, {"image": [10, 10, 10, 10], "text": [16, 0, 0, 0]}),
        ),
    )


def loads_row(image: list[int], text: list[int]) -> LogEntry:
    """An entry with the same expert loads in both layers."""
    layers = tuple(layer(block, {"image": image, "text": text}) for block in (1, 2))
    return replace(metrics_row(), layers=layers)


def test_end_of_a_run_is_its_last_tenth() -> None:
    rows = [metrics_row(float(step)) for step in range(40)]
    assert run_metrics.losses(run_metrics.end_of_run(rows)) == {
        "main": 5.0,
        "contrastive": 37.5,
        "caption": 2.0,
    }
    assert len(run_metrics.end_of_run(rows[:3])) == 1


def test_expert_load() -> None:
    metrics = run_metrics.routing([metrics_row(), metrics_row()], RUN)
    assert metrics is not None
    assert (metrics["dead"], metrics["experts"]) == (0, 8)
    # Layer 1: 14, 14, 24, 4 with mean 14; layer 2: 26, 10, 10, 10 with mean 14.
    assert metrics["max_over_mean"] == pytest.approx((24 / 14 + 26 / 14) / 2)

    image, text = metrics["image"], metrics["text"]
    assert image["max_over_mean"] == pytest.approx((2 + 1) / 2)
    assert text["max_over_mean"] == pytest.approx((1 + 4) / 2)
    assert image["used"] == pytest.approx((np.exp(1.5 * np.log(2)) + 4) / 2)
    assert (text["entropy"], text["mean_entropy"], text["dropped"]) == (1.5, 1.2, 0.0)


@pytest.mark.parametrize(("load", "dead"), [(9, 2), (11, 0), (150, 0)])
def test_dead_experts_have_less_than_one_percent_of_the_mean(load: int, dead: int) -> None:
    loads = [1000, 1000, 2000 - load, load]  # the mean is 1000
    metrics = run_metrics.routing([loads_row(loads, loads)], RUN)
    assert metrics is not None and metrics["dead"] == dead


def test_load_is_computed_per_pool() -> None:
    pooled = replace(RUN, moe=MoEConfig(num_experts=4, pools="modality"))
    metrics = run_metrics.routing([loads_row([30, 0, 0, 0], [0, 0, 5, 5])], pooled)
    assert metrics is not None
    assert metrics["dead"] == 2
    assert metrics["image"]["max_over_mean"] == 2.0
    assert metrics["text"]["max_over_mean"] == 1.0


def test_dense_run_has_no_routing_metrics() -> None:
    dense = replace(RUN, moe=replace(RUN.moe, stop=0))
    assert run_metrics.routing([metrics_row()], dense) is None


def test_text_tokens_exclude_patches() -> None:
    throughput = replace(log_entry().throughput, samples_per_second=10.0)
    rows = [
        log_entry(throughput=replace(throughput, tokens_per_second=tokens))
        for tokens in (480.0, 500.0)
    ]
    assert RUN.model.num_patches == 36
    assert run_metrics.text_tokens_per_pair(rows, RUN) == pytest.approx(49 - 36)


def test_mean_over_seeds() -> None:
    assert seed_means.seed_mean([1.0, 2.0, 3.0]) == (2.0, 1.0, 3)
    assert seed_means.seed_mean([1.0, None]).text() == "1.00"
    assert seed_means.seed_mean([]).text() == "-"


def test_paired_difference() -> None:
    # Both vary by 10 with the seed; their difference hardly varies.
    difference = seed_means.paired_difference([11.0, 21.0, 31.2], [10.0, 20.0, 30.0])
    assert difference.mean == pytest.approx(1.0667, abs=1e-3) and difference.deviation < 0.2
    assert difference.text(1, signed=True) == "+1.1 ± 0.1"


def test_lookup_of_nested_values() -> None:
    assert seed_means.lookup({"a": {"b": 2}}, ("a", "b")) == 2.0
    assert seed_means.lookup({"a": None}, ("a", "b")) is None
    assert seed_means.lookup({"a": {"b": None}}, ("a", "b")) is None
