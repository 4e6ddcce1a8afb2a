"""Logs of a run, read back: metrics.jsonl, corrupt_samples.jsonl, TensorBoard scalars, console."""

from __future__ import annotations

import errno
import json
import logging
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.samples import SampleProblem
from pretrain.train.jsonl import read_rows
from pretrain.train.layer_metrics import max_over_mean
from pretrain.train.log_entry import Losses
from pretrain.train.progress import progress_line
from pretrain.train.reporter import Reporter
from tests.support.log_entries import layer as layer_of
from tests.support.log_entries import log_entry
from tests.unit.pretrain.reporter_support import MOE_BLOCKS, RUN, events, scalars


def problem(key: str, reason: str = "corrupt-image") -> SampleProblem:
    return SampleProblem("shard-000001.tar", key, reason, "no image")


def test_metrics_are_written_to_tensorboard_and_jsonl(tmp_path: Path) -> None:
    reporter = Reporter(tmp_path, RUN, 0)
    for step in (10, 20):
        reporter.log_step(log_entry(step, total=1 / step, learning_rate=1e-3))
    reporter.close()
    assert scalars(tmp_path, "loss/total") == {10: pytest.approx(0.1), 20: pytest.approx(0.05)}
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [(row["step"], row["loss/total"], row["optim/lr"]) for row in rows] == [
        (10, 0.1, 1e-3),
        (20, 0.05, 1e-3),
    ]
    logged = set(events(tmp_path).Tags()["scalars"])
    assert all(set(row) == logged | {"step"} for row in rows)


def test_tokens_per_expert_by_layer_and_modality(tmp_path: Path) -> None:
    load_LME = np.arange(16).reshape(2, 2, 4)
    layers = tuple(
        layer_of(block, {"image": load_ME[0].tolist(), "text": load_ME[1].tolist()})
        for block, load_ME in zip(MOE_BLOCKS, load_LME, strict=True)
    )
    reporter = Reporter(tmp_path, RUN, 0)
    reporter.log_step(log_entry(5, layers=layers))
    reporter.close()
    row = read_rows(tmp_path / "metrics.jsonl")[0]
    accumulator = events(tmp_path)
    for layer, block in enumerate(MOE_BLOCKS):
        for index, modality in enumerate(("image", "text")):
            name, load_E = f"layer_{block:02d}/{modality}", load_LME[layer, index]
            assert row[f"moe/tokens_per_expert/{name}"] == load_E.tolist()
            histogram = accumulator.Histograms(f"moe/tokens_per_expert/{name}")[0].histogram_value
            assert (histogram.bucket, histogram.bucket_limit) == (load_E.tolist(), [1, 2, 3, 4])
            assert histogram.num == load_E.sum()
            expected = pytest.approx(load_E.max() / load_E.mean())
            assert row[f"moe/max_over_mean_load/{name}"] == expected


def test_resumed_run_logs_every_step_once(tmp_path: Path) -> None:
    reporter = Reporter(tmp_path, RUN, 0)
    for step in (10, 20, 30):
        reporter.log_step(log_entry(step, total=float(step)))
        reporter.log_corrupt_samples([problem(f"first-{step}")], step)
    reporter.close()
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 40, "loss/to')  # killed in the middle of a line
    resumed = Reporter(tmp_path, RUN, 20)
    assert resumed.corrupt_counts == {"corrupt-image": 2}
    for step in (30, 40):
        resumed.log_step(log_entry(step, total=-float(step)))
        resumed.log_corrupt_samples([problem(f"second-{step}")], step)
    resumed.close()
    expected = {10: 10.0, 20: 20.0, 30: -30.0, 40: -40.0}
    assert scalars(tmp_path, "loss/total") == expected
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [(row["step"], row["loss/total"]) for row in rows] == list(expected.items())
    corrupt = read_rows(tmp_path / "corrupt_samples.jsonl")
    assert [row["key"] for row in corrupt] == ["first-10", "first-20", "second-30", "second-40"]
    assert resumed.corrupt_counts == {"corrupt-image": 4}


def test_run_that_restarts_from_step_0_overwrites_its_logs(tmp_path: Path) -> None:
    for value in (1.0, 2.0):
        time.sleep(1.1)  # TensorBoard orders event files by the second in their names
        reporter = Reporter(tmp_path, RUN, 0)
        reporter.log_step(log_entry(10, total=value))
        reporter.close()
    assert scalars(tmp_path, "loss/total") == {10: 2.0}
    assert len(read_rows(tmp_path / "metrics.jsonl")) == 1


def test_nan_and_infinity_are_valid_json(tmp_path: Path) -> None:
    reporter = Reporter(tmp_path, RUN, 0)
    reporter.log_step(log_entry(1, total=math.nan, grad_norm=math.inf))
    reporter.close()
    row = json.loads(
        (tmp_path / "metrics.jsonl").read_text(), parse_constant=lambda name: pytest.fail(name)
    )
    assert (row["loss/total"], row["optim/grad_norm"]) == ("nan", "inf")


def test_corrupt_samples_are_listed_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    reporter = Reporter(tmp_path, RUN, 7)
    with caplog.at_level(logging.WARNING):
        reporter.log_corrupt_samples([problem("k1"), problem("k2", "no-caption"), problem("k3")])
        reporter.log_corrupt_samples([])
    reporter.close()
    assert read_rows(tmp_path / "corrupt_samples.jsonl")[1] == {
        "step": 8,
        "shard": "shard-000001.tar",
        "key": "k2",
        "reason": "no-caption",
        "detail": "no image",
        "id": -1,
    }
    assert sum(record.levelno == logging.WARNING for record in caplog.records) == 1
    assert "corrupt-image 2, no-caption 1" in caplog.text
    assert reporter.corrupt_counts == {"corrupt-image": 2, "no-caption": 1}


def test_full_disk_does_not_stop_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    reporter = Reporter(tmp_path, RUN, 0)

    def disk_full(row: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(reporter._metrics, "write", disk_full)
    for step in (1, 2):
        reporter.log_step(log_entry(step, total=1.0))
    reporter.close()
    errors = [record.message for record in caplog.records if record.levelno == logging.ERROR]
    assert len(errors) == 1
    assert "metrics.jsonl" in errors[0] and "No space left on device" in errors[0]
    assert scalars(tmp_path, "loss/total") == {1: 1.0, 2: 1.0}


def test_progress_line() -> None:
    assert progress_line(log_entry(40), RUN) == (
        "step 40/100  loss 4.2000 = contrastive 3.000 + 2 x caption 0.600  lr 3.00e-04  "
        "396 samples/s  21,000 tokens/s  data wait 5%  2m00s left"
    )


def test_progress_line_of_routing_and_filters() -> None:
    losses = Losses(
        total=4.2,
        terms={"contrastive": 4.0, "caption": 0.0, "balance": 1.2, "router_z": 2.0, "a": 0.02},
        weighted={"contrastive": 4.18, "caption": 0.0, "balance": 0.0, "router_z": 0.02, "a": 2e-4},
    )
    layers = tuple(
        layer_of(block, {"text": [9, 0, 0, 0]}, max_over_mean_load=load)
        for block, load in zip(MOE_BLOCKS, (1.3, 1.5), strict=True)
    )
    entry = log_entry(40, losses=losses, layers=layers)
    data = replace(entry.data, filtered={"min-side": 0.2, "words": 0.05})
    line = progress_line(replace(entry, data=data), RUN)
    assert "loss 4.2000 = 1.04 x contrastive 4.000 + 0.01 x router_z 2.000  max/mean" in line
    assert f"max/mean expert load 1.50  dead experts 6/{2 * RUN.moe.num_experts}  lr" in line
    assert "filtered 25%" in line


def test_an_expert_with_tokens_of_one_modality_is_not_dead() -> None:
    loads = {"image": [9, 0, 0, 1], "text": [0, 0, 5, 0]}
    line = progress_line(log_entry(40, layers=(layer_of(1, loads),)), RUN)
    assert f"dead experts 1/{RUN.moe.num_experts}" in line
    full = layer_of(1, {"image": [9, 1, 1, 1], "text": [0, 0, 5, 0]})
    assert "dead" not in progress_line(log_entry(40, layers=(full,)), RUN)


def test_max_over_mean() -> None:
    assert max_over_mean(np.array([4, 0, 0, 0])) == 4.0
    assert max_over_mean(np.array([3, 3])) == 1.0
    assert max_over_mean(np.array([0, 0])) == 0.0


def test_keys_with_unicode_line_separators(tmp_path: Path) -> None:
    keys = ["a\u2028b", "c\u0085d", "e\x0cf", "g\u2029"]
    reporter = Reporter(tmp_path, RUN, 0)
    reporter.log_corrupt_samples([problem(key) for key in keys], 1)
    reporter.close()
    assert [row["key"] for row in read_rows(tmp_path / "corrupt_samples.jsonl")] == keys
    Reporter(tmp_path, RUN, 5).close()  # a resumed run keeps all of them
    assert [row["key"] for row in read_rows(tmp_path / "corrupt_samples.jsonl")] == keys


def test_control_characters_of_keys_are_escaped_on_the_console(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    reporter = Reporter(tmp_path, RUN, 0)
    reporter.log_corrupt_samples([problem("\x1b]0;title\x07\x9b2J\u202e")], 1)
    reporter.close()
    assert not set("\x1b\x07\x9b\u202e") & set(caplog.text)
    assert r"\x1b]0;title\x07\x9b2J\u202e" in caplog.text
