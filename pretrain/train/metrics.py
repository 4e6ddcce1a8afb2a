"""Metrics of training steps, aggregated over the steps since the last log entry.

Every rank keeps a `Window`. Rank 0 combines it with a `RankReport` of each rank into metrics and
tables.

Shapes: L MoE layers, M modalities, E experts.
"""

from __future__ import annotations

import resource
import sys
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from data_pipeline.order.order import Order
from data_pipeline.samples import SampleProblem
from pretrain.config.schema import RunConfig
from pretrain.model.count import count_flops
from pretrain.moe.statistics import MODALITIES
from pretrain.train.state import TrainState
from pretrain.train.step import StepResult

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

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        return {
            "wait": self.wait_seconds,
            "memory": self.memory_gib,
            "problems": [list(p) for p in self.problems],
            "filtered": self.filtered,
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
        )


class Window:
    """The steps since the last log entry."""

    def __init__(self, run: RunConfig, world_size: int, device: torch.device) -> None:
        self._run, self._world_size, self._device = run, world_size, device
        self.reset()

    def reset(self) -> None:
        """Start a new window."""
        self._start = time.perf_counter()
        self._results: list[StepResult] = []
        self._wait_seconds = 0.0
        self._problems: list[SampleProblem] = []
        self._filtered: Counter[str] = Counter()

    def exclude_pause(self) -> None:
        """Exclude the time since the last step, such as saving, if no step has been added yet."""
        if not self._results:
            self._start = time.perf_counter()

    def add(self, result: StepResult, wait_seconds: float, problems: list[SampleProblem]) -> None:
        """Add one step; `problems` are its skipped samples, corrupt or filtered."""
        self._results.append(result)
        self._wait_seconds += wait_seconds
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
        )

    def summary(
        self, state: TrainState, reports: list[RankReport], rate: float
    ) -> tuple[dict[str, float], dict[str, np.ndarray[Any, Any]]]:
        """Metrics by name and tables by name; losses are means over the window."""
        seconds = max(1e-9, time.perf_counter() - self._start)
        results, last = self._results, self._results[-1]
        pairs, tokens = sum(r.pairs for r in results), sum(r.tokens for r in results)
        metrics = {
            f"loss/{name}": float(np.mean([r.losses[name] for r in results]))
            for name in last.losses
        }
        metrics |= {
            "loss/logit_scale": last.logit_scale,
            "optim/lr": rate,
            "optim/grad_norm": float(np.mean([r.grad_norm for r in results])),
            "perf/samples_per_second": pairs / seconds,
            "perf/tokens_per_second": tokens / seconds,
            "perf/seconds_per_step": seconds / len(results),
            "perf/flops_per_second": self._flops(pairs, tokens) / seconds,
            "perf/memory_gib": max(report.memory_gib for report in reports),
            "data/wait_seconds": max(report.wait_seconds for report in reports),
            "data/samples_seen": float(state.samples_seen),
            "data/epoch_position": float(state.loader.position),
        }
        metrics |= self._filtered_ratios(reports, len(results))
        peak = _peak_flops(self._device)
        if peak:
            metrics["perf/mfu"] = metrics["perf/flops_per_second"] / (peak * self._world_size)
        assignments_LME = torch.stack([r.assignments_LME for r in results]).sum(dim=0).numpy()
        metrics |= routing_metrics(last, self._run) | load_metrics(assignments_LME, self._run)
        return metrics, {"moe/tokens_per_expert": assignments_LME}

    def _filtered_ratios(self, reports: list[RankReport], steps: int) -> dict[str, float]:
        """Fraction of read samples that each filter excluded; filters without any are omitted."""
        counts = sum((Counter(report.filtered) for report in reports), Counter[str]())
        samples_read = steps * self._run.batch.global_batch_size
        return {
            f"data/filtered/{reason.removeprefix('filter:')}": count / samples_read
            for reason, count in sorted(counts.items())
        }

    def _flops(self, pairs: int, tokens: int) -> float:
        """Forward and backward FLOPs of the window, for its actual text lengths."""
        model = self._run.model
        text_tokens = tokens / max(1, pairs) - model.num_patches
        return pairs * count_flops(model, self._run.moe, text_tokens=max(0.0, text_tokens)).training


def load_metrics(assignments_LME: np.ndarray[Any, Any], run: RunConfig) -> dict[str, float]:
    """Largest and smallest expert load of each layer, divided by the mean load.

    The mean is that of the expert's pool: with modality pools, the experts of the other pool cannot
    receive its tokens.
    """
    metrics = {}
    for layer, block in enumerate(run.moe.blocks(run.model.num_layers)):
        load_E = assignments_LME[layer].sum(axis=0)
        pools = [
            load_E[pool] / max(1.0, float(load_E[pool].mean())) for pool in run.moe.pool_slices()
        ]
        ratio_E = np.concatenate(pools)
        metrics[f"moe/max_over_mean_load/layer_{block:02d}"] = float(ratio_E.max())
        metrics[f"moe/min_over_mean_load/layer_{block:02d}"] = float(ratio_E.min())
    return metrics


def routing_metrics(result: StepResult, run: RunConfig) -> dict[str, float]:
    """Routing statistics of one step by layer and modality; modalities without tokens are omitted.

    Names are `moe/NAME/layer_LL/MODALITY`, where NAME is

    - `entropy` (nats): mean entropy of a token's scores;
    - `mean_entropy` (nats): entropy of the mean scores;
    - `top_probability`: mean of a token's largest score;
    - `top1_ratio`: fraction of tokens whose best expert is the most common best expert;
    - `dropped`: fraction of assignments dropped by the capacity limit (only with a capacity);
    - `bias_range`: largest minus smallest routing bias (only with biases).
    """
    metrics: dict[str, float] = {}
    for layer, block in enumerate(run.moe.blocks(run.model.num_layers)):
        for index, modality in enumerate(MODALITIES):
            if not result.tokens_M[index]:
                continue
            for name, value in _routing_values(result, run, layer, index).items():
                metrics[f"moe/{name}/layer_{block:02d}/{modality}"] = value
    return metrics


def _routing_values(
    result: StepResult, run: RunConfig, layer: int, modality: int
) -> dict[str, float]:
    """`routing_metrics` of one layer and modality, by NAME."""
    stats, tokens = result.router, float(result.tokens_M[modality])
    mean_E = stats.prob_sum_ME[layer, modality] / tokens
    values = {
        "entropy": float(stats.entropy_sum_M[layer, modality]) / tokens,
        "mean_entropy": float(torch.special.entr(mean_E).sum()),
        "top_probability": float(stats.top1_prob_sum_M[layer, modality]) / tokens,
        "top1_ratio": float(stats.top1_ME[layer, modality].max()) / tokens,
    }
    if run.moe.uses_capacity:
        assignments = float(stats.assignments_ME[layer, modality].sum())
        kept = float(stats.kept_ME[layer, modality].sum())
        values["dropped"] = 1 - kept / max(1.0, assignments)
    if len(result.biases):
        bias_index = min(modality, result.biases.shape[1] - 1)
        bias_E = result.biases[layer, bias_index, run.moe.pool(modality)]
        values["bias_range"] = float(bias_E.max() - bias_E.min())
    return values


def source_metrics(order: Order, position: int) -> dict[str, float]:
    """Completed epochs of each source, and its fraction of all samples so far."""
    metrics = {}
    for name, samples, epochs in order.consumed(position):
        metrics[f"data/epochs/{name}"] = epochs
        metrics[f"data/sample_ratio/{name}"] = samples / max(1, position)
    return metrics


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
