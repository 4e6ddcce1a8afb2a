"""Metrics of training steps, aggregated over the steps since the last log entry.

Every rank keeps a `Window`. Rank 0 combines it with a `RankReport` of each rank into a `LogEntry`.

Shapes: L MoE layers, M modalities, E experts.
"""

from __future__ import annotations

import resource
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from data_pipeline.order.order import Consumed
from data_pipeline.samples import Batch, SampleProblem
from pretrain.config.schema import RunConfig
from pretrain.model.count import count_flops
from pretrain.train.layer_metrics import layer_metrics
from pretrain.train.log_entry import (
    DataMetrics,
    LogEntry,
    Losses,
    Throughput,
)
from pretrain.train.state import TrainState
from pretrain.train.step_result import StepResult

Array = np.ndarray[Any, Any]

PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12}
"""Peak dense bf16 FLOP/s by a substring of the GPU's name, from data sheets; for MFU."""


@dataclass(frozen=True, kw_only=True)
class RankReport:
    """What one rank reports about the steps since the last log entry."""

    wait_seconds: float
    """Mean time per step spent waiting for data."""
    memory_gib: float
    """Peak memory: allocated on the GPU, or resident on CPU."""
    problems: tuple[SampleProblem, ...]
    """Corrupt samples."""
    filtered: dict[str, int]
    """Number of samples that each filter excluded."""
    read: tuple[int, ...]
    """Number of samples of each source, skipped ones included."""
    skipped: tuple[int, ...]
    """Number of skipped samples of each source."""
    truncated: int
    """Captions that have more tokens than the context length."""

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        return {
            "wait": self.wait_seconds,
            "memory": self.memory_gib,
            "problems": [list(p) for p in self.problems],
            "filtered": self.filtered,
            "read": list(self.read),
            "skipped": list(self.skipped),
            "truncated": self.truncated,
        }

    @staticmethod
    def from_json(value: dict[str, Any]) -> RankReport:
        """Parse the result of `to_json`."""
        problems = tuple(SampleProblem(*problem) for problem in value["problems"])
        return RankReport(
            wait_seconds=value["wait"],
            memory_gib=value["memory"],
            problems=problems,
            filtered=value["filtered"],
            read=tuple(value["read"]),
            skipped=tuple(value["skipped"]),
            truncated=value["truncated"],
        )


class SourceSize(NamedTuple):
    """The samples of a source, by whose indices they are assigned to it."""

    name: str
    samples: int
    """Dropped ones included."""


class Window:
    """The steps since the last log entry."""

    def __init__(
        self,
        run: RunConfig,
        world_size: int,
        device: torch.device,
        sources: Sequence[SourceSize],
    ) -> None:
        """Start a window.

        Args:
            run: The run.
            world_size: Number of ranks.
            device: Where the model is.
            sources: The sources of the data, in order.
        """
        self._run, self._world_size, self._device = run, world_size, device
        self._source_names = [source.name for source in sources]
        self._source_ends = np.cumsum([source.samples for source in sources])
        self.reset()

    def reset(self) -> None:
        """Start a new window."""
        self._start = time.perf_counter()
        self._results: list[StepResult] = []
        self._wait_seconds = 0.0
        self._problems: list[SampleProblem] = []
        self._filtered: Counter[str] = Counter()
        self._read_S, self._skipped_S = self._count_by_source([]), self._count_by_source([])
        self._truncated = 0

    def exclude_pause(self) -> None:
        """Exclude the time since the last step, such as saving, if no step has been added yet."""
        if not self._results:
            self._start = time.perf_counter()

    def add(self, result: StepResult, wait_seconds: float, batches: Sequence[Batch]) -> None:
        """Add one step with the micro-batches of this rank."""
        self._results.append(result)
        self._wait_seconds += wait_seconds
        problems = [problem for batch in batches for problem in batch.problems]
        skipped = [problem.id for problem in problems]
        delivered = [sample for batch in batches for sample in batch.ids.tolist()]
        self._skipped_S += self._count_by_source(skipped)
        self._read_S += self._count_by_source(delivered + skipped)
        self._truncated += sum(batch.num_truncated for batch in batches)
        for problem in problems:
            if problem.is_filtered:
                self._filtered[problem.reason] += 1
            else:
                self._problems.append(problem)

    def rank_report(self) -> RankReport:
        """The report of this rank."""
        return RankReport(
            wait_seconds=self._wait_seconds / max(1, len(self._results)),
            memory_gib=_peak_memory_gib(self._device),
            problems=tuple(self._problems),
            filtered=dict(self._filtered),
            read=tuple(self._read_S.tolist()),
            skipped=tuple(self._skipped_S.tolist()),
            truncated=self._truncated,
        )

    def entry(
        self,
        state: TrainState,
        reports: list[RankReport],
        *,
        learning_rate: float,
        consumed: Sequence[Consumed],
        corrupt: Mapping[str, int],
    ) -> LogEntry:
        """The log entry of this window.

        Args:
            state: The run after the last step.
            reports: Of every rank.
            learning_rate: Of the last step.
            consumed: Samples of each source so far.
            corrupt: Number of corrupt samples so far, by reason.
        """
        seconds = max(1e-9, time.perf_counter() - self._start)
        results, last = self._results, self._results[-1]
        updated = [result for result in results if result.is_updated] or results
        read_S = np.sum([report.read for report in reports], axis=0)
        skipped_S = np.sum([report.skipped for report in reports], axis=0)
        captions = int(read_S.sum() - skipped_S.sum())
        assignments_LME = torch.stack([r.assignments_LME for r in results]).sum(dim=0).numpy()
        return LogEntry(
            step=state.step,
            losses=_mean_losses(updated),
            logit_scale=last.logit_scale,
            learning_rate=learning_rate,
            grad_norm=float(np.mean([r.grad_norm for r in updated])),
            skipped_updates=sum(not result.is_updated for result in results),
            throughput=self._throughput(seconds, reports),
            data=DataMetrics(
                wait_seconds=max(report.wait_seconds for report in reports),
                samples_seen=float(state.samples_seen),
                epoch_position=float(state.loader.position),
                filtered=self._filtered_ratios(reports, len(results)),
                skipped={
                    name: skipped / read
                    for name, read, skipped in zip(
                        self._source_names, read_S.tolist(), skipped_S.tolist(), strict=True
                    )
                    if read
                },
                truncated=sum(report.truncated for report in reports) / max(1, captions),
                epochs={name: epochs for name, _, epochs in consumed},
                sample_ratio={
                    name: samples / max(1, sum(source.samples for source in consumed))
                    for name, samples, _ in consumed
                },
                corrupt={reason: float(count) for reason, count in corrupt.items()},
            ),
            layers=layer_metrics(last, assignments_LME, self._run),
        )

    def _throughput(self, seconds: float, reports: list[RankReport]) -> Throughput:
        pairs = sum(r.pairs for r in self._results)
        tokens = sum(r.tokens for r in self._results)
        flops_per_second = self._flops(pairs, tokens) / seconds
        peak = _peak_flops(self._device)
        return Throughput(
            samples_per_second=pairs / seconds,
            tokens_per_second=tokens / seconds,
            seconds_per_step=seconds / len(self._results),
            flops_per_second=flops_per_second,
            memory_gib=max(report.memory_gib for report in reports),
            mfu=flops_per_second / (peak * self._world_size) if peak else None,
        )

    def _count_by_source(self, samples: list[int]) -> Array:
        """How many of the samples each source has, int64 `[sources]`."""
        source = np.searchsorted(self._source_ends, samples, side="right")
        return np.bincount(source, minlength=len(self._source_names))

    def _filtered_ratios(self, reports: list[RankReport], steps: int) -> dict[str, float]:
        counts = sum((Counter(report.filtered) for report in reports), Counter[str]())
        samples_read = steps * self._run.batch.global_batch_size
        return {
            reason.removeprefix("filter:"): count / samples_read
            for reason, count in sorted(counts.items())
        }

    def _flops(self, pairs: int, tokens: int) -> float:
        """Forward and backward FLOPs of the window, for its actual text lengths."""
        model = self._run.model
        text_tokens = tokens / max(1, pairs) - model.num_patches
        return pairs * count_flops(model, self._run.moe, text_tokens=max(0.0, text_tokens)).training


def _mean_losses(results: Sequence[StepResult]) -> Losses:
    means = {name: float(np.mean([r.losses[name] for r in results])) for name in results[0].losses}
    terms = {name: means[name] for name in means if f"weighted/{name}" in means}
    weighted = {name: means[f"weighted/{name}"] for name in terms}
    return Losses(total=means["total"], terms=terms, weighted=weighted)


def _peak_memory_gib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


def _peak_flops(device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    gpu = torch.cuda.get_device_name(device)
    return next((peak for name, peak in PEAK_FLOPS.items() if name in gpu), None)
