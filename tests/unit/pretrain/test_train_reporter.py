"""What a run writes for people, read back from the files."""

from __future__ import annotations

import errno
import io
import json
import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from data_pipeline.samples import SampleProblem
from pretrain.config.experts import MoEConfig
from pretrain.config.schema import ModelConfig, RunConfig, ScheduleConfig
from pretrain.evaluate.routing.figure import LESS, MORE, cell_side
from pretrain.train.figure import COLUMNS, MARGIN, RIGHT, TILE, WRONG, draw_captions
from pretrain.train.journal import read_rows
from pretrain.train.reporter import Reporter, max_over_mean, progress_line

RUN = RunConfig(
    model=ModelConfig(num_layers=4),
    moe=MoEConfig(num_experts=4, start=1, every=2),
    schedule=ScheduleConfig(total_steps=100, warmup_steps=10),
)
BLOCKS = (1, 3)
NO_TABLES: dict[str, Any] = {}


def events(run_dir: Path) -> EventAccumulator:
    accumulator = EventAccumulator(
        str(run_dir / "tensorboard"),
        size_guidance={"scalars": 0, "histograms": 0, "images": 0, "tensors": 0},
    )
    return accumulator.Reload()


def scalars(run_dir: Path, name: str) -> dict[int, float]:
    found = events(run_dir).Scalars(name)
    assert len({event.step for event in found}) == len(found), "a step is there twice"
    return {event.step: event.value for event in found}


def problem(key: str, reason: str = "bad-image") -> SampleProblem:
    return SampleProblem("shard-000001.tar", key, reason, "no picture")


def test_numbers_are_in_events_and_in_the_journal(tmp_path: Path) -> None:
    reporter = Reporter(tmp_path, RUN, 0)
    for step in (10, 20):
        reporter.step(step, {"loss/total": 1 / step, "optim/lr": 1e-3}, NO_TABLES)
    reporter.close()
    assert scalars(tmp_path, "loss/total") == {10: pytest.approx(0.1), 20: pytest.approx(0.05)}
    assert read_rows(tmp_path / "metrics.jsonl") == [
        {"step": 10, "loss/total": 0.1, "optim/lr": 1e-3},
        {"step": 20, "loss/total": 0.05, "optim/lr": 1e-3},
    ]


def test_tokens_per_expert_by_layer_and_modality(tmp_path: Path) -> None:
    load_LME = np.arange(16.0).reshape(2, 2, 4)
    reporter = Reporter(tmp_path, RUN, 0)
    reporter.step(5, {}, {"moe/tokens_per_expert": load_LME})
    reporter.close()
    row = read_rows(tmp_path / "metrics.jsonl")[0]
    found = events(tmp_path)
    for layer, block in enumerate(BLOCKS):
        for column, modality in enumerate(("image", "text")):
            name, load_E = f"layer_{block:02d}/{modality}", load_LME[layer, column]
            assert row[f"moe/tokens_per_expert/{name}"] == load_E.tolist()
            bars = found.Histograms(f"moe/tokens_per_expert/{name}")[0].histogram_value
            assert (bars.bucket, bars.bucket_limit) == (load_E.tolist(), [1, 2, 3, 4])
            assert bars.num == load_E.sum()
            assert row[f"moe/max_over_mean_load/{name}"] == pytest.approx(
                load_E.max() / load_E.mean()
            )


def test_routing_is_shown_as_pictures(tmp_path: Path) -> None:
    load_LME = np.ones((2, 2, 4)) * 10
    load_LME[1, 0] = [40, 0, 0, 0]
    coactivation_LEE = np.full((2, 4, 4), 30) - np.diag([20] * 4)
    reporter = Reporter(tmp_path, RUN, 0)
    reporter.routing(7, load_LME, coactivation_LEE)
    reporter.close()
    found = events(tmp_path)
    assert found.Tags()["images"] == ["moe/load", "moe/coactivation"]
    (shown,) = found.Images("moe/load")
    assert shown.step == 7
    pixels = np.asarray(Image.open(io.BytesIO(shown.encoded_image_string)))
    cell = (cell_side(4, 2) - 1) ** 2
    assert 0.5 * cell < (pixels == np.array(MORE)).all(axis=2).sum() <= cell  # one busy expert
    assert 1.5 * cell < (pixels == np.array(LESS)).all(axis=2).sum() <= 3 * cell  # three idle ones
    even = np.asarray(
        Image.open(io.BytesIO(found.Images("moe/coactivation")[0].encoded_image_string))
    )
    assert (
        not (even == np.array(MORE)).all(axis=2).any()
        and not (even == np.array(LESS)).all(axis=2).any()
    )


@pytest.mark.parametrize(
    ("top_k", "coactivation_LEE"),
    [
        (1, np.zeros((2, 4, 4), dtype=np.int64)),
        (2, np.zeros((2, 0, 0), dtype=np.int64)),
    ],
    ids=["one expert a token", "not counted"],
)
def test_without_pairs_of_experts_there_is_only_the_load(
    tmp_path: Path, top_k: int, coactivation_LEE: Any
) -> None:
    reporter = Reporter(tmp_path, replace(RUN, moe=replace(RUN.moe, top_k=top_k)), 0)
    reporter.routing(1, np.zeros((2, 2, 4)), coactivation_LEE)
    reporter.close()
    assert events(tmp_path).Tags()["images"] == ["moe/load"]


def test_a_resumed_run_has_every_step_once(tmp_path: Path) -> None:
    reporter = Reporter(tmp_path, RUN, 0)
    for step in (10, 20, 30):
        reporter.step(step, {"loss/total": float(step)}, NO_TABLES)
        reporter.bad_samples([problem(f"first-{step}")], step)
    reporter.close()
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 40, "loss/to')  # a kill in the middle of a line
    resumed = Reporter(tmp_path, RUN, 20)
    assert resumed.bad_counts == {"bad-image": 2}
    for step in (30, 40):
        resumed.step(step, {"loss/total": -float(step)}, NO_TABLES)
        resumed.bad_samples([problem(f"second-{step}")], step)
    resumed.close()
    expected = {10: 10.0, 20: 20.0, 30: -30.0, 40: -40.0}
    assert scalars(tmp_path, "loss/total") == expected
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [(row["step"], row["loss/total"]) for row in rows] == list(expected.items())
    bad = read_rows(tmp_path / "bad_samples.jsonl")
    assert [row["key"] for row in bad] == ["first-10", "first-20", "second-30", "second-40"]
    assert resumed.bad_counts == {"bad-image": 4}


def test_a_run_that_starts_again_forgets_all(tmp_path: Path) -> None:
    for value in (1.0, 2.0):
        reporter = Reporter(tmp_path, RUN, 0)
        reporter.step(10, {"loss/total": value}, NO_TABLES)
        reporter.close()
    assert scalars(tmp_path, "loss/total") == {10: 2.0}
    assert len(read_rows(tmp_path / "metrics.jsonl")) == 1


def test_numbers_that_are_none_stay_valid_json(tmp_path: Path) -> None:
    reporter = Reporter(tmp_path, RUN, 0)
    reporter.step(1, {"loss/total": math.nan, "optim/grad_norm": math.inf}, NO_TABLES)
    reporter.close()
    row = json.loads(
        (tmp_path / "metrics.jsonl").read_text(), parse_constant=lambda name: pytest.fail(name)
    )
    assert row == {"step": 1, "loss/total": "nan", "optim/grad_norm": "inf"}


def test_bad_samples_are_named_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    reporter = Reporter(tmp_path, RUN, 7)
    with caplog.at_level(logging.WARNING):
        reporter.bad_samples([problem("k1"), problem("k2", "no-caption"), problem("k3")])
        reporter.bad_samples([])
    reporter.step(8, {}, NO_TABLES)
    reporter.close()
    assert read_rows(tmp_path / "bad_samples.jsonl")[1] == {
        "step": 8,
        "shard": "shard-000001.tar",
        "key": "k2",
        "reason": "no-caption",
        "detail": "no picture",
        "id": -1,
    }
    assert sum(record.levelno == logging.WARNING for record in caplog.records) == 1
    assert "bad-image 2, no-caption 1" in caplog.text
    assert scalars(tmp_path, "data/bad/bad-image") == {8: 2.0}


def test_pictures_come_with_their_captions(tmp_path: Path) -> None:
    images = np.zeros((6, 3, 8, 8), dtype=np.uint8)
    reporter = Reporter(tmp_path, RUN, 0)
    reporter.pictures(5, images, ["a fox"] * 6, ["a fox"] * 5 + ["a | <b>cat</b>"])
    reporter.close()
    found = events(tmp_path)
    shown = found.Images("captions")[0]
    assert shown.step == 5
    assert Image.open(io.BytesIO(shown.encoded_image_string)).size == (shown.width, shown.height)
    text = found.Tensors("captions/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "| a fox | a &#124; &lt;b>cat&lt;/b> |" in text


def test_a_sheet_shows_the_pictures_and_marks_the_right_captions() -> None:
    images = np.random.default_rng(0).integers(0, 255, (5, 3, 48, 48), dtype=np.uint8)
    sheet = draw_captions(
        images, ["a fox", "blue bull", "", "a", "漢字"], ["a fox ", "a fox", "b", "c", "d"]
    )
    assert sheet.dtype == np.uint8
    assert sheet.shape[1] == COLUMNS * (TILE + MARGIN) + MARGIN
    tile = sheet[MARGIN : MARGIN + TILE, MARGIN : MARGIN + TILE]
    assert np.array_equal(tile[2::4, 2::4], images[0].transpose(1, 2, 0))
    inks = [
        {
            tuple(pixel)
            for pixel in sheet[MARGIN + TILE :][:60, x : x + TILE].reshape(-1, 3).tolist()
        }
        for x in (MARGIN, 2 * MARGIN + TILE)
    ]
    assert RIGHT in inks[0] and WRONG not in inks[0]
    assert WRONG in inks[1] and RIGHT not in inks[1]


def test_a_full_disk_does_not_stop_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    reporter = Reporter(tmp_path, RUN, 0)

    def full(row: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(reporter._metrics, "write", full)
    for step in (1, 2):
        reporter.step(step, {"loss/total": 1.0}, NO_TABLES)
    reporter.close()
    assert (
        sum("cannot write metrics.jsonl any more" in record.message for record in caplog.records)
        == 1
    )
    assert scalars(tmp_path, "loss/total") == {1: 1.0, 2: 1.0}


def test_the_console_line_says_what_matters() -> None:
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
    routers = {
        "loss/balance": 1.2,
        "loss/weighted/balance": 0.0,
        "loss/router_z": 2.0,
        "loss/weighted/router_z": 0.02,
        "moe/max_over_mean_load/layer_01": 1.3,
        "moe/max_over_mean_load/layer_03": 1.5,
        "moe/max_over_mean_load/layer_03/text": 9.0,
    }
    assert progress_line(40, {"loss/total": 4.2, "optim/lr": 3e-4} | routers, RUN) == (
        "step 40/100  loss 4.2000 (router_z 2.000)  busiest expert x1.50  lr 3.00e-04"
    )
    assert progress_line(100, {}, RUN) == "step 100/100"


def test_max_over_mean_of_loads() -> None:
    assert max_over_mean(np.array([4, 0, 0, 0])) == 4.0
    assert max_over_mean(np.array([3, 3])) == 1.0
    assert max_over_mean(np.array([0, 0])) == 0.0


def test_a_row_survives_whatever_its_key_holds(tmp_path: Path) -> None:
    keys = ["a\u2028b", "c\u0085d", "e\x0cf", "g\u2029"]
    reporter = Reporter(tmp_path, RUN, 0)
    reporter.bad_samples([problem(key) for key in keys], 1)
    reporter.close()
    assert [row["key"] for row in read_rows(tmp_path / "bad_samples.jsonl")] == keys
    Reporter(tmp_path, RUN, 5).close()  # a resumed run keeps them all
    assert [row["key"] for row in read_rows(tmp_path / "bad_samples.jsonl")] == keys


def test_a_key_cannot_steer_the_terminal(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    reporter = Reporter(tmp_path, RUN, 0)
    reporter.bad_samples([problem("\x1b]0;title\x07\x9b2J\u202e")], 1)
    reporter.close()
    assert not set("\x1b\x07\x9b\u202e") & set(caplog.text)
    assert r"\x1b]0;title\x07\x9b2J\u202e" in caplog.text
