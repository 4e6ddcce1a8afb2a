"""Metrics of the steps since the last log entry: means, speed, and the reports of all ranks."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from data_pipeline.loading.collate import BatchBuilder
from data_pipeline.order.order import Consumed
from data_pipeline.order.state import LoaderState
from data_pipeline.samples import Batch, SampleProblem
from pretrain.config.schema import BatchConfig
from pretrain.model.count import count_flops
from pretrain.moe.statistics import RouterStats
from pretrain.parallel.communicator import LocalCommunicator
from pretrain.train import metrics
from pretrain.train.log_entry import LogEntry, Losses
from pretrain.train.metrics import PEAK_FLOPS, RankReport, SourceSize, Window
from pretrain.train.reporter import Reporter
from pretrain.train.state import TrainState
from pretrain.train.step_result import StepResult
from pretrain.train.window_logs import WindowLogs
from tests.unit.pretrain.reporter_support import MOE_BLOCKS, RUN, scalars

CPU = torch.device("cpu")
SMALL_RUN = replace(RUN, batch=BatchConfig(global_batch_size=8, micro_batch_size=4))
WORLD_SIZE = 2
PATCHES, TEXT_TOKENS = SMALL_RUN.model.num_patches, 10
SOURCES = (SourceSize("web", 10), SourceSize("books", 4))
CORRUPT = SampleProblem("shard.tar", "k1", "corrupt-image", "no image", 3)
FILTERED = SampleProblem("shard.tar", "k2", "filter:min-side", "", 10)


def step_result(factor: float = 1.0, pairs: int = 8, *, is_updated: bool = True) -> StepResult:
    """A step whose losses and gradient norm are multiples of `factor`."""
    shape = (len(MOE_BLOCKS), 2, SMALL_RUN.moe.num_experts)
    zeros = {name: torch.zeros(shape) for name in RouterStats._fields}
    zeros |= {name: torch.zeros(shape[:2]) for name in RouterStats._fields if name.endswith("_M")}
    losses = {"total": 4.0, "contrastive": 2.0, "caption": 1.0}
    losses |= {"weighted/contrastive": 2.0, "weighted/caption": 2.0}
    return StepResult(
        losses={name: factor * value for name, value in losses.items()},
        grad_norm=factor,
        is_updated=is_updated,
        logit_scale=10.0 * factor,
        pairs=pairs,
        tokens_M=torch.tensor([PATCHES * pairs, TEXT_TOKENS * pairs]),
        router=RouterStats(**zeros),
        biases=torch.zeros(0),
    )


def report(**changes: Any) -> RankReport:
    return replace(
        RankReport(
            wait_seconds=0.0,
            memory_gib=0.0,
            problems=(),
            filtered={},
            read=(0, 0),
            skipped=(0, 0),
            truncated=0,
        ),
        **changes,
    )


def entry_of(
    window: Window, *reports: RankReport, position: int = 0, consumed: tuple[Consumed, ...] = ()
) -> LogEntry:
    return window.entry(
        TrainState(step=6, samples_seen=40, loader=LoaderState(position=position)),
        list(reports) or [report()],
        learning_rate=1e-3,
        consumed=consumed,
        corrupt={"corrupt-image": 2},
    )


def window_of(*results: StepResult, device: torch.device = CPU) -> Window:
    window = Window(SMALL_RUN, WORLD_SIZE, device, SOURCES)
    for result in results:
        window.add(result, 0.0, [])
    return window


def skip_batch(*problems: SampleProblem) -> Batch:
    """A batch without samples."""
    return BatchBuilder(1, image_size=8, context_length=4, pad_id=0).packed(problems).unpack()


class Clock:
    """Replaces the clock of the metrics."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seconds = 100.0
        clock = SimpleNamespace(perf_counter=lambda: self.seconds)
        monkeypatch.setattr(metrics, "time", clock)


def test_losses_and_gradient_norm_are_means_over_the_steps() -> None:
    entry = entry_of(window_of(step_result(1), step_result(2), step_result(6)))
    assert entry.losses == Losses(
        total=12.0,
        terms={"contrastive": 6.0, "caption": 3.0},
        weighted={"contrastive": 6.0, "caption": 6.0},
    )
    assert entry.grad_norm == 3.0
    assert entry.logit_scale == 60.0  # of the last step


def test_means_are_those_of_the_updates() -> None:
    skipped = step_result(math.nan, is_updated=False)
    entry = entry_of(window_of(step_result(1), skipped, step_result(3), skipped))
    assert (entry.losses.total, entry.grad_norm, entry.skipped_updates) == (8.0, 2.0, 2)
    entry = entry_of(window_of(skipped))
    assert math.isnan(entry.losses.total) and entry.skipped_updates == 1


def test_speed_over_the_time_of_all_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    window = window_of(step_result(pairs=8), step_result(pairs=4))
    clock.seconds += 3.0
    speed = entry_of(window).throughput
    flops = count_flops(SMALL_RUN.model, SMALL_RUN.moe, text_tokens=TEXT_TOKENS).training
    assert (speed.samples_per_second, speed.seconds_per_step) == (4.0, 1.5)
    assert speed.tokens_per_second == 4.0 * (PATCHES + TEXT_TOKENS)
    assert speed.flops_per_second == pytest.approx(4.0 * flops)
    assert speed.mfu is None  # the peak of a CPU is unknown


def test_pause_before_the_first_step_is_excluded(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    window = window_of()
    clock.seconds += 50.0
    window.exclude_pause()
    clock.seconds += 2.0
    window.add(step_result(), 0.0, [])
    window.exclude_pause()
    assert entry_of(window).throughput.seconds_per_step == 2.0


def test_mfu_is_relative_to_the_peak_of_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    window = window_of(step_result(), device=torch.device("cuda"))
    clock.seconds += 2.0
    speed = entry_of(window).throughput
    peak = WORLD_SIZE * PEAK_FLOPS["A100"]
    assert speed.mfu == pytest.approx(speed.flops_per_second / peak)


def test_waiting_time_and_memory_are_those_of_the_worst_rank() -> None:
    window = window_of(step_result())
    reports = [
        report(wait_seconds=0.2, memory_gib=3.0),
        report(wait_seconds=0.5, memory_gib=1.0),
        report(wait_seconds=0.1, memory_gib=2.0),
    ]
    entry = entry_of(window, *reports)
    assert (entry.data.wait_seconds, entry.throughput.memory_gib) == (0.5, 3.0)


def test_filtered_samples_of_all_ranks_per_sample_read() -> None:
    """Three steps of 8 samples were read."""
    window = window_of(step_result(), step_result(), step_result())
    reports = [
        report(filtered={"filter:words": 2, "filter:min-side": 1}),
        report(filtered={"filter:words": 4}),
    ]
    assert entry_of(window, *reports).data.filtered == {"min-side": 1 / 24, "words": 6 / 24}


def test_skipped_samples_of_each_source_and_truncated_captions() -> None:
    reports = [
        report(read=(6, 0), skipped=(1, 0), truncated=1),
        report(read=(4, 0), skipped=(1, 0), truncated=3),
    ]
    data = entry_of(window_of(step_result()), *reports).data
    assert data.skipped == {"web": 0.2}  # no sample of the other source was read
    assert data.truncated == 4 / 8


def test_progress_in_the_data() -> None:
    consumed = (Consumed("web", 36, 1.5), Consumed("books", 12, 0.25))
    data = entry_of(window_of(step_result()), position=48, consumed=consumed).data
    assert (data.samples_seen, data.epoch_position) == (40.0, 48.0)
    assert data.epochs == {"web": 1.5, "books": 0.25}
    assert data.sample_ratio == {"web": 0.75, "books": 0.25}
    # In a later phase, only its samples count, and the position is larger.
    assert entry_of(window_of(step_result()), position=480, consumed=consumed).data == replace(
        data, epoch_position=480.0
    )
    assert data.corrupt == {"corrupt-image": 2.0}


def test_report_of_a_rank() -> None:
    """Corrupt samples are listed, filtered ones counted, and the waiting time is per step."""
    window = window_of()
    first = skip_batch(FILTERED, CORRUPT)._replace(ids=torch.tensor([0, 9, 13]), num_truncated=2)
    window.add(step_result(), 0.3, [first, skip_batch(FILTERED)])
    window.add(step_result(), 0.1, [skip_batch(FILTERED)])
    found = window.rank_report()
    assert found.wait_seconds == pytest.approx(0.2) and found.memory_gib > 0
    assert (found.problems, found.filtered) == ((CORRUPT,), {"filter:min-side": 3})
    assert (found.read, found.skipped, found.truncated) == ((3, 4), (1, 3), 2)
    assert RankReport.from_json(found.to_json()) == found

    window.reset()
    empty = window.rank_report()
    assert empty == report(memory_gib=empty.memory_gib)


class TwoRanks(LocalCommunicator):
    """Rank 0 of two ranks; the other one reports one corrupt sample every time."""

    def __init__(self) -> None:
        super().__init__(CPU)
        self.world_size = WORLD_SIZE

    def all_gather_json(self, value: Any) -> list[Any]:
        return [value, report(problems=(CORRUPT,)).to_json()]


def test_log_entries_count_the_corrupt_samples_of_all_ranks_so_far(tmp_path: Path) -> None:
    reporter = Reporter(tmp_path, SMALL_RUN, 0)
    components: Any = SimpleNamespace(run=SMALL_RUN, communicator=TwoRanks())
    sources = [
        SimpleNamespace(name=name, manifest=SimpleNamespace(total_samples=count))
        for name, count in SOURCES
    ]
    loader: Any = SimpleNamespace(
        order=SimpleNamespace(consumed=lambda position: [Consumed("web", position, 0.5)]),
        sources=sources,
    )
    logs = WindowLogs(components, loader, reporter, first_sample=0)
    for step in (4, 8):
        logs.window.add(step_result(), 0.0, [skip_batch(CORRUPT)] if step == 4 else [])
        logs.write(TrainState(step=step, loader=LoaderState(position=8 * step)), 1e-3)
    reporter.close()
    assert scalars(tmp_path, "data/corrupt/corrupt-image") == {4: 2.0, 8: 3.0}
    assert scalars(tmp_path, "data/skipped/web") == {4: 1.0}
    assert scalars(tmp_path, "data/sample_ratio/web") == {4: 1.0, 8: 1.0}
