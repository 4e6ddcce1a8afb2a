"""From step results to the numbers that people watch.

Every rank keeps a `Window` of the steps since the last report; rank 0 turns it, with a small report
of each rank, into metrics and tables.
"""

from __future__ import annotations

import resource
import sys
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from data_pipeline.common.errors import DataError
from data_pipeline.common.harmless import harmless
from data_pipeline.order.order import Order
from data_pipeline.samples import Batch, SampleProblem
from pretrain.config.schema import RunConfig
from pretrain.model.count import count_flops
from pretrain.moe.statistics import MODALITIES
from pretrain.train.state import TrainState
from pretrain.train.step import StepResult

PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12}
"""Dense bf16 peak of GPUs by a part of their name, FLOP/s (vendors' data sheets), for MFU."""


@dataclass(frozen=True, kw_only=True)
class RankReport:
    """What one rank has to tell about the steps since the last report."""

    wait_seconds: float
    """Mean wait for data per step."""
    memory_gib: float
    """Largest memory held so far: of the GPU, or resident on CPU."""
    problems: tuple[SampleProblem, ...]
    """Bad samples this rank met."""
    filtered: dict[str, int]
    """Samples left out on purpose, by the filter that did."""

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
        """Read what `to_json` gave."""
        problems = tuple(SampleProblem(*problem) for problem in value["problems"])
        return RankReport(
            wait_seconds=value["wait"],
            memory_gib=value["memory"],
            problems=problems,
            filtered=value["filtered"],
        )


class Window:
    """The steps since the last report."""

    def __init__(self, run: RunConfig, world_size: int, device: torch.device) -> None:
        self._run, self._world, self._device = run, world_size, device
        self.restart()

    def restart(self) -> None:
        """Begin a new window now."""
        self._since = time.perf_counter()
        self._results: list[StepResult] = []
        self._waited = 0.0
        self._problems: list[SampleProblem] = []
        self._filtered: Counter[str] = Counter()

    def skip_pause(self) -> None:
        """Do not count the time since the last step (a checkpoint, pictures) as training."""
        if not self._results:
            self._since = time.perf_counter()

    def add(self, result: StepResult, waited: float, problems: list[SampleProblem]) -> None:
        """Count one step; `problems` are the samples it went without, bad ones and filtered
        ones."""
        self._results.append(result)
        self._waited += waited
        for problem in problems:
            if problem.is_filtered:
                self._filtered[problem.reason] += 1
            else:
                self._problems.append(problem)

    def rank_report(self) -> RankReport:
        """This rank's part."""
        return RankReport(
            wait_seconds=self._waited / max(1, len(self._results)),
            memory_gib=_memory_gib(self._device),
            problems=tuple(self._problems),
            filtered=dict(self._filtered),
        )

    def summary(
        self, state: TrainState, reports: list[RankReport], rate: float
    ) -> tuple[dict[str, float], dict[str, np.ndarray[Any, Any]]]:
        """Metrics by name and tables by name, over the window; losses are those of its mean."""
        seconds = max(1e-9, time.perf_counter() - self._since)
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
        metrics |= self._filtered_shares(reports, len(results))
        peak = _peak_flops(self._device)
        if peak:
            metrics["perf/mfu"] = metrics["perf/flops_per_second"] / (peak * self._world)
        choices_LME = torch.stack([r.choices_LME for r in results]).sum(dim=0).numpy()
        return metrics | self._moe_metrics(choices_LME, last), {
            "moe/tokens_per_expert": choices_LME
        }

    def _filtered_shares(self, reports: list[RankReport], steps: int) -> dict[str, float]:
        """What share of the samples read each filter left out; nothing where none did."""
        counts = sum((Counter(report.filtered) for report in reports), Counter[str]())
        read = steps * self._run.batch.global_batch_size
        return {
            f"data/filtered/{reason.removeprefix('filter:')}": n / read
            for reason, n in sorted(counts.items())
        }

    def _flops(self, pairs: int, tokens: int) -> float:
        """Forward and backward FLOPs of the window, for the text lengths that it really had."""
        model = self._run.model
        text_tokens = tokens / max(1, pairs) - model.num_patches
        return pairs * count_flops(model, self._run.moe, text_tokens=max(0.0, text_tokens)).training

    def _moe_metrics(self, choices_LME: np.ndarray[Any, Any], last: StepResult) -> dict[str, float]:
        """Balance of each layer: busiest and idlest expert against a fair share, and what the
        router is like.

        A fair share is that of the expert's pool: with pools by modality the others cannot get its
        tokens.
        """
        metrics = routing_metrics(last, self._run)
        for row, block in enumerate(self._run.moe.blocks(self._run.model.num_layers)):
            load_E = choices_LME[row].sum(axis=0)
            pools = [
                load_E[pool] / max(1.0, float(load_E[pool].mean()))
                for pool in self._run.moe.pool_slices()
            ]
            ratio_E = np.concatenate(pools)
            metrics[f"moe/max_over_mean_load/layer_{block:02d}"] = float(ratio_E.max())
            metrics[f"moe/min_over_mean_load/layer_{block:02d}"] = float(ratio_E.min())
        return metrics


def routing_metrics(result: StepResult, run: RunConfig) -> dict[str, float]:
    """What the routers of a step were like, by layer and modality.

    `entropy` (nats) of a token's scores, `mean_entropy` of the scores' mean, `top_probability` the
    mean of a token's largest score, `top1_share` the tokens whose best expert is the one that most
    have, with capacity `dropped`, the choices that found no place, and with biases `bias_range`,
    how far they lie apart. A modality without tokens has no numbers.
    """
    stats = result.router
    found: dict[str, float] = {}
    for row, block in enumerate(run.moe.blocks(run.model.num_layers)):
        for column, modality in enumerate(MODALITIES):
            tokens, choices = (
                float(result.tokens_M[column]),
                float(stats.choices_ME[row, column].sum()),
            )
            if not tokens:
                continue
            mean_E = stats.prob_sum_ME[row, column] / tokens
            values = {
                "entropy": float(stats.entropy_sum_M[row, column]) / tokens,
                "mean_entropy": float(torch.special.entr(mean_E).sum()),
                "top_probability": float(stats.top_sum_M[row, column]) / tokens,
                "top1_share": float(stats.first_ME[row, column].max()) / tokens,
            }
            if run.moe.capacity_factor:
                values["dropped"] = 1 - float(stats.kept_ME[row, column].sum()) / max(1.0, choices)
            if len(result.biases):
                bias_E = result.biases[
                    row, min(column, result.biases.shape[1] - 1), run.moe.pool(column)
                ]
                values["bias_range"] = float(bias_E.max() - bias_E.min())
            found |= {
                f"moe/{name}/layer_{block:02d}/{modality}": value for name, value in values.items()
            }
    return found


def source_metrics(order: Order, position: int) -> dict[str, float]:
    """How many epochs of each source lie behind, and its share of all samples so far."""
    metrics = {}
    for name, samples, epochs in order.consumed(position):
        metrics[f"data/epochs/{name}"] = epochs
        metrics[f"data/share/{name}"] = samples / max(1, position)
    return metrics


class BadSamples:
    """Counts the bad samples of all ranks and stops the run when they are too many; the same on
    every rank.

    Two verdicts: the share since the start, and, because a long run would take days to notice,
    whether most of what was read lately was bad.
    """

    AT_LEAST = 100
    """Bad samples before their share is judged: a few are no verdict."""
    LATELY = 10_000
    """Samples that are "lately", at least; windows of the log are counted whole."""

    def __init__(self, max_share: float, *, read: int) -> None:
        self._max_share, self._read_before = max_share, read
        self._read, self._bad, self._first = read, 0, ""
        self._lately: deque[tuple[int, int, str]] = deque()
        """Samples read, bad ones among them and the first of these, of the last windows."""

    def add(self, reports: list[RankReport], *, read: int) -> None:
        """Count the problems of a window.

        Args:
            reports: Of all ranks.
            read: Samples read since the beginning of training, over all ranks.

        Raises:
            DataError: More than the allowed share of what was read since the start, and at least
            100 samples,
                were bad; or more than half (or the allowed share, if that is larger) of what was
                read lately.
        """
        problems = [problem for report in reports for problem in report.problems]
        first = (
            "{0.shard}, sample {0.key!r}: {0.reason}: {0.detail}".format(problems[0])
            if problems
            else ""
        )
        first = harmless(first)  # keys come from anybody's files
        self._first = self._first or first
        self._bad += len(problems)
        self._lately.append((read - self._read, len(problems), first))
        self._read = read
        while sum(window[0] for window in list(self._lately)[1:]) >= self.LATELY:
            self._lately.popleft()
        self._judge(self._bad, read - self._read_before, self._max_share, self._first, "samples")
        read_lately, bad_lately = (
            sum(window[0] for window in self._lately),
            sum(window[1] for window in self._lately),
        )
        first_lately = next((window[2] for window in self._lately if window[2]), "")
        self._judge(
            bad_lately, read_lately, max(0.5, self._max_share), first_lately, "samples read lately"
        )

    def _judge(self, bad: int, read: int, share: float, first: str, what: str) -> None:
        if bad >= self.AT_LEAST and bad > share * read:
            raise DataError(
                f"{bad} of {read} {what} were bad, more than {share:g} (data.max_corrupt_ratio is {self._max_share:g}); "
                f"the first: {first}. All are named in bad_samples.jsonl of the run folder. Mend the "
                f"shards, or allow more with data.max_corrupt_ratio"
            )


def nothing_left(step: int, batches: Sequence[Batch]) -> DataError:
    """The error of a step for which no rank had a single sample."""
    reasons = Counter(problem.reason for batch in batches for problem in batch.problems)
    counts = ", ".join(f"{reason} {count}" for reason, count in reasons.most_common(3))
    return DataError(
        f"not one sample of the global batch of step {step} can be used (on this rank: {counts or 'nothing read'}); "
        f"look at data.filters and at bad_samples.jsonl of the run folder"
    )


def _memory_gib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


def _peak_flops(device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)
