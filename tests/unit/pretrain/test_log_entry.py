"""Log entries: the names of their metrics, and reading them back."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from data_pipeline.common.errors import DataError
from pretrain.train.jsonl import read_log
from pretrain.train.log_entry import DataMetrics, LogEntry, RouterMetrics
from tests.support.log_entries import layer, log_entry

ROUTER = RouterMetrics(
    entropy=1.0,
    mean_entropy=1.2,
    top_probability=0.6,
    top1_ratio=0.4,
    dropped=0.1,
    bias_range=0.02,
)


def full_entry() -> LogEntry:
    """An entry with every optional metric."""
    entry = log_entry(
        40,
        layers=(
            layer(1, {"image": [10, 10, 20, 0], "text": [4, 4, 4, 4]}, ROUTER),
            layer(12, {"image": [1, 2, 3, 4], "text": [0, 0, 0, 0]}, max_over_mean_load=1.6),
        ),
        data=DataMetrics(
            wait_seconds=0.1,
            samples_seen=640.0,
            epoch_position=648.0,
            filtered={"min-side": 0.25},
            skipped={"web/en": 0.25},
            truncated=0.5,
            epochs={"web/en": 1.5, "books": 0.5},
            sample_ratio={"web/en": 0.75, "books": 0.25},
            corrupt={"corrupt-image": 2.0},
        ),
    )
    return replace(entry, throughput=replace(entry.throughput, mfu=0.4))


def test_names_of_metrics() -> None:
    """The names are an interface: dashboards and scripts of users read them."""
    row = full_entry().to_row()
    expected = {
        *("step", "loss/total", "loss/contrastive", "loss/caption", "loss/weighted/contrastive"),
        *("loss/weighted/caption", "loss/logit_scale", "optim/lr", "optim/grad_norm"),
        *("optim/skipped_updates",),
        *("perf/samples_per_second", "perf/tokens_per_second", "perf/seconds_per_step"),
        *("perf/flops_per_second", "perf/memory_gib", "perf/mfu", "data/wait_seconds"),
        *("data/skipped/web/en", "data/truncated"),
        *("data/samples_seen", "data/epoch_position", "data/filtered/min-side"),
        *("data/epochs/web/en", "data/epochs/books", "data/sample_ratio/web/en"),
        *("data/sample_ratio/books", "data/corrupt/corrupt-image"),
    }
    for label in ("layer_01", "layer_12"):
        expected |= {f"moe/{name}_over_mean_load/{label}" for name in ("max", "min")}
        for modality in ("image", "text"):
            names = ["tokens_per_expert", "max_over_mean_load"]
            names += ["entropy", "mean_entropy", "top_probability", "top1_ratio"]
            names += ["dropped", "bias_range"] if label == "layer_01" else []
            expected |= {f"moe/{name}/{label}/{modality}" for name in names}
    assert set(row) == expected
    assert row["moe/tokens_per_expert/layer_01/image"] == [10, 10, 20, 0]
    assert row["moe/max_over_mean_load/layer_12"] == 1.6
    assert row["moe/dropped/layer_01/text"] == 0.1


def test_metrics_without_a_value_are_omitted() -> None:
    without_tokens = replace(layer(1, {"text": [0, 0]}).modalities["text"], router=None)
    entry = log_entry(layers=(replace(layer(1, {}), modalities={"text": without_tokens}),))
    row = entry.to_row()
    assert "perf/mfu" not in row and "moe/entropy/layer_01/text" not in row
    assert LogEntry.from_row(row) == entry


def test_entry_is_read_back() -> None:
    entry = full_entry()
    assert LogEntry.from_row(json.loads(json.dumps(entry.to_row()))) == entry


def test_nan_is_read_back_from_its_string() -> None:
    entry = LogEntry.from_row(
        log_entry().to_row() | {"loss/total": "nan", "optim/grad_norm": "inf"}
    )
    assert math.isnan(entry.losses.total) and entry.grad_norm == math.inf


def test_row_of_another_version(tmp_path: Path) -> None:
    row = log_entry(40).to_row()
    del row["optim/lr"]
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError) as caught:
        read_log(path)
    assert "step 40" in str(caught.value) and "optim/lr" in str(caught.value)


def test_incomplete_last_row_is_ignored(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert read_log(path) == []
    path.write_text(json.dumps(log_entry(1).to_row()) + '\n{"perf/samples_per')
    assert read_log(path) == [log_entry(1)]
