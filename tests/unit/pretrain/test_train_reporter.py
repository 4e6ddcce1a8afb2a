"""Logs of a run, read back: metrics.jsonl, corrupt_samples.jsonl, TensorBoard scalars, console."""

from __future__ import annotations

import errno
import json
import logging
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.samples import SampleProblem
from pretrain.train.jsonl import read_rows
from pretrain.train.progress import progress_line
from pretrain.train.reporter import Reporter, max_over_mean
from tests.unit.pretrain.reporter_support import MOE_BLOCKS, NO_TABLES, RUN, events, scalars


def problem(key: str, reason: str = "corrupt-image") -> SampleProblem:
    return SampleProblem("shard-000001.tar", key, reason, "no image")


def test_metrics_are_written_to_tensorboard_and_jsonl(tmp_path: Path) -> None:
    reporter = Reporter(tmp_path, RUN, 0)
    for step in (10, 20):
        reporter.log_step(step, {"loss/total": 1 / step, "optim/lr": 1e-3}, NO_TABLES)
    reporter.close()
    assert scalars(tmp_path, "loss/total") == {10: pytest.approx(0.1), 20: pytest.approx(0.05)}
    assert read_rows(tmp_path / "metrics.jsonl") == [
        {"step": 10, "loss/total": 0.1, "optim/lr": 1e-3},
        {"step": 20, "loss/total": 0.05, "optim/lr": 1e-3},
    ]


def test_tokens_per_expert_by_layer_and_modality(tmp_path: Path) -> None:
    load_LME = np.arange(16.0).reshape(2, 2, 4)
    reporter = Reporter(tmp_path, RUN, 0)
    reporter.log_step(5, {}, {"moe/tokens_per_expert": load_LME})
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
        reporter.log_step(step, {"loss/total": float(step)}, NO_TABLES)
        reporter.log_corrupt_samples([problem(f"first-{step}")], step)
    reporter.close()
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 40, "loss/to')  # killed in the middle of a line
    resumed = Reporter(tmp_path, RUN, 20)
    assert resumed.corrupt_counts == {"corrupt-image": 2}
    for step in (30, 40):
        resumed.log_step(step, {"loss/total": -float(step)}, NO_TABLES)
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
        reporter.log_step(10, {"loss/total": value}, NO_TABLES)
        reporter.close()
    assert scalars(tmp_path, "loss/total") == {10: 2.0}
    assert len(read_rows(tmp_path / "metrics.jsonl")) == 1


def test_nan_and_infinity_are_valid_json(tmp_path: Path) -> None:
    reporter = Reporter(tmp_path, RUN, 0)
    reporter.log_step(1, {"loss/total": math.nan, "optim/grad_norm": math.inf}, NO_TABLES)
    reporter.close()
    row = json.loads(
        (tmp_path / "metrics.jsonl").read_text(), parse_constant=lambda name: pytest.fail(name)
    )
    assert row == {"step": 1, "loss/total": "nan", "optim/grad_norm": "inf"}


def test_corrupt_samples_are_listed_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    reporter = Reporter(tmp_path, RUN, 7)
    with caplog.at_level(logging.WARNING):
        reporter.log_corrupt_samples([problem("k1"), problem("k2", "no-caption"), problem("k3")])
        reporter.log_corrupt_samples([])
    reporter.log_step(8, {}, NO_TABLES)
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
    assert scalars(tmp_path, "data/corrupt/corrupt-image") == {8: 2.0}


def test_full_disk_does_not_stop_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    reporter = Reporter(tmp_path, RUN, 0)

    def disk_full(row: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(reporter._metrics, "write", disk_full)
    for step in (1, 2):
        reporter.log_step(step, {"loss/total": 1.0}, NO_TABLES)
    reporter.close()
    errors = [record.message for record in caplog.records if record.levelno == logging.ERROR]
    assert len(errors) == 1
    assert "metrics.jsonl" in errors[0] and "No space left on device" in errors[0]
    assert scalars(tmp_path, "loss/total") == {1: 1.0, 2: 1.0}


def test_progress_line() -> None:
    metrics = {
        "loss/total": 4.2,
        "loss/contrastive": 3.0,
        "loss/caption": 0.6,
        "optim/lr": 3e-4,
        "perf/samples_per_second": 396.2,
        "perf/tokens_per_second": 21000.0,
        "perf/seconds_per_step": 2.0,
        "data/wait_seconds": 0.1,
    }
    assert progress_line(40, metrics, RUN) == (
        "step 40/100  loss 4.2000 (contrastive 3.000, caption 0.600)  lr 3.00e-04  396 samples/s  "
        "21,000 tokens/s  data wait 5%  2m00s left"
    )
    assert progress_line(100, {}, RUN) == "step 100/100"


def test_progress_line_of_routing() -> None:
    metrics = {
        "loss/total": 4.2,
        "optim/lr": 3e-4,
        "loss/balance": 1.2,
        "loss/weighted/balance": 0.0,
        "loss/router_z": 2.0,
        "loss/weighted/router_z": 0.02,
        "moe/max_over_mean_load/layer_01": 1.3,
        "moe/max_over_mean_load/layer_03": 1.5,
        "moe/max_over_mean_load/layer_03/text": 9.0,
    }
    assert progress_line(40, metrics, RUN) == (
        "step 40/100  loss 4.2000 (router_z 2.000)  max/mean expert load 1.50  lr 3.00e-04"
    )


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
