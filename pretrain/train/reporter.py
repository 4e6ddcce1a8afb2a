"""What people see of a run: a console line, TensorBoard, metrics.jsonl and bad_samples.jsonl.

Only rank 0 has a reporter. Going on from a checkpoint, it takes back what was written about later
steps, so that every step appears once. Trouble with these files never stops a run: it is said once,
and that file gets no more.
"""

from __future__ import annotations

import logging
import re
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.tensorboard import SummaryWriter

from data_pipeline.common.harmless import harmless
from data_pipeline.common.logs import clock_text
from data_pipeline.samples import SampleProblem
from pretrain.config.schema import RunConfig
from pretrain.evaluate.routing.figure import draw_grids
from pretrain.evaluate.routing.grids import coactivation_grids, load_grids
from pretrain.moe.statistics import MODALITIES
from pretrain.train.figure import draw_captions
from pretrain.train.journal import Journal

logger = logging.getLogger(__name__)

Array = np.ndarray[Any, Any]

TOKENS_PER_EXPERT = "moe/tokens_per_expert"
TERMS = ("contrastive", "caption", "balance", "router_z")


class Reporter:
    """Writes about one run into its folder; see the module."""

    def __init__(self, run_dir: Path, run: RunConfig, resumed_step: int) -> None:
        """Open the files.

        Args:
            run_dir: The run's folder; made if missing.
            run: The run.
            resumed_step: Steps done before; what is there about later ones is taken back.
        """
        run_dir.mkdir(parents=True, exist_ok=True)
        self._run = run
        self._blocks = run.moe.blocks(run.model.num_layers)
        self._last_step = resumed_step
        self._failed: set[str] = set()
        self._metrics = Journal(run_dir / "metrics.jsonl", resumed_step=resumed_step)
        self._bad = Journal(run_dir / "bad_samples.jsonl", resumed_step=resumed_step)
        self.bad_counts = Counter(str(row.get("reason")) for row in self._bad.kept)
        """Bad samples so far, by reason."""
        _leave_errors_to_the_next_write()
        # purge_step tells TensorBoard to forget what older event files say from that step on.
        self._events = SummaryWriter(
            str(run_dir / "tensorboard"), purge_step=resumed_step + 1, flush_secs=10
        )

    def step(self, step: int, metrics: Mapping[str, float], tables: Mapping[str, Array]) -> None:
        """Report one step everywhere.

        Args:
            step: Optimizer steps done.
            metrics: Numbers by name, such as `loss/total`.
            tables: `moe/tokens_per_expert`, `[MoE layers, modalities, experts]`.
        """
        self._last_step = step
        load_LME = tables.get(TOKENS_PER_EXPERT)
        numbers = dict(metrics) | {
            f"data/bad/{reason}": float(n) for reason, n in self.bad_counts.items()
        }
        loads = {} if load_LME is None else self._loads(load_LME)
        if load_LME is not None:
            numbers |= self._busiest(load_LME)
        rows = {name: load_E.tolist() for name, load_E in loads.items()}
        self._try("metrics.jsonl", lambda: self._metrics.write({"step": step} | numbers | rows))
        self._try("tensorboard", lambda: self._write_events(step, numbers, loads))
        logger.info("%s", progress_line(step, metrics, self._run))

    def pictures(
        self, step: int, images: Array, written: Sequence[str], true: Sequence[str]
    ) -> None:
        """Show pictures with the captions that the model wrote.

        Args:
            step: Optimizer steps done.
            images: uint8 `[pictures, 3, height, width]`.
            written: The model's caption of each.
            true: The true caption of each.
        """

        def write() -> None:
            sheet = draw_captions(images, written, true)
            self._events.add_image("captions", sheet, step, dataformats="HWC")
            # As text too: the drawing has letters for Latin alphabets only.
            self._events.add_text("captions", _caption_table(written, true), step)
            self._events.flush()

        self._try("tensorboard", write)

    def routing(self, step: int, load_LME: Array, coactivation_LEE: Array) -> None:
        """Show the routing of one step as pictures: `moe/load` and, of several experts a token,
        `moe/coactivation`.

        Args:
            step: Optimizer steps done.
            load_LME: Token choices, `[MoE layers, modalities, experts]`.
            coactivation_LEE: Tokens that chose both experts, `[MoE layers, experts, experts]`.
        """

        def write() -> None:
            sheets = {"moe/load": load_grids(load_LME, self._blocks, self._run.moe)}
            if self._run.moe.top_k > 1 and coactivation_LEE.size:
                sheets["moe/coactivation"] = coactivation_grids(
                    coactivation_LEE, self._blocks, self._run.moe
                )
            for name, grids in sheets.items():
                self._events.add_image(name, np.asarray(draw_grids(grids)), step, dataformats="HWC")
            self._events.flush()

        self._try("tensorboard", write)

    def bad_samples(self, problems: Sequence[SampleProblem], step: int | None = None) -> None:
        """Name samples that could not be used, and count them by reason.

        Args:
            problems: Since the last call.
            step: Step in which they were met; by default the one after the last reported.
        """
        met = self._last_step + 1 if step is None else step

        def write() -> None:
            for problem in problems:
                self._bad.write({"step": met} | problem._asdict())

        self._try("bad_samples.jsonl", write)
        self.bad_counts.update(problem.reason for problem in problems)
        if problems:
            counts = ", ".join(
                f"{reason} {count}" for reason, count in sorted(self.bad_counts.items())
            )
            logger.warning(
                "left out %d bad sample%s (all so far: %s), named in bad_samples.jsonl; the first: "
                "%s, sample %s: %s: %s",
                len(problems),
                "s" * (len(problems) > 1),
                harmless(counts),
                *(harmless(str(field)) for field in problems[0][:4]),
            )

    def close(self) -> None:
        """Finish all files."""
        self._try("tensorboard", self._events.close)
        self._try("metrics.jsonl", self._metrics.close)
        self._try("bad_samples.jsonl", self._bad.close)

    def _busiest(self, load_LME: Array) -> dict[str, float]:
        """Load of the busiest expert by layer and modality, against a fair share of those that
        serve the modality."""
        return {
            f"moe/max_over_mean_load/layer_{block:02d}/{modality}": max_over_mean(
                load_LME[row, column, self._run.moe.pool(column)]
            )
            for row, block in enumerate(self._blocks)
            for column, modality in enumerate(MODALITIES)
        }

    def _loads(self, load_LME: Array) -> dict[str, Array]:
        """Token choices of each expert by layer and modality, by name."""
        return {
            f"{TOKENS_PER_EXPERT}/layer_{block:02d}/{modality}": load_LME[row, column].astype(
                np.int64
            )
            for row, block in enumerate(self._blocks)
            for column, modality in enumerate(MODALITIES)
        }

    def _write_events(
        self, step: int, numbers: Mapping[str, float], loads: Mapping[str, Array]
    ) -> None:
        for name, value in numbers.items():
            self._events.add_scalar(name, value, step)
        for name, load_E in loads.items():
            self._write_bars(name, load_E, step)
        self._events.flush()

    def _write_bars(self, name: str, load_E: Array, step: int) -> None:
        """A histogram with one bar an expert: bar e lies from e to e + 1 and is as high as its
        tokens."""
        centers_E = np.arange(len(load_E)) + 0.5
        self._events.add_histogram_raw(
            name,
            min=0.0,
            max=float(len(load_E)),
            num=int(load_E.sum()),
            sum=float(load_E @ centers_E),
            sum_squares=float(load_E @ centers_E**2),
            bucket_limits=(centers_E + 0.5).tolist(),
            bucket_counts=load_E.tolist(),
            global_step=step,
        )

    def _try(self, what: str, write: Callable[[], None]) -> None:
        if what in self._failed:
            return
        try:
            write()
        except OSError as error:
            self._failed.add(what)
            reason = error.strerror or error
            logger.error("cannot write %s any more (%s); training goes on without it", what, reason)


def _leave_errors_to_the_next_write() -> None:
    """Do not print errors of TensorBoard's writing thread: it hands them to the next write, which
    tells them."""
    before = threading.excepthook

    def hook(found: threading.ExceptHookArgs) -> None:
        if type(found.thread).__name__ != "_AsyncWriterThread" or not isinstance(
            found.exc_value, OSError
        ):
            before(found)

    threading.excepthook = hook


def max_over_mean(load_E: Array) -> float:
    """Load of the busiest expert as a multiple of a fair share; 1 is even, 0 means no tokens."""
    return float(load_E.max() / load_E.mean()) if load_E.sum() > 0 else 0.0


_LOAD = re.compile(r"moe/max_over_mean_load/layer_\d+")
"""Of a layer, over both modalities."""


def progress_line(step: int, metrics: Mapping[str, float], run: RunConfig) -> str:
    """The console line of a step; leaves out what `metrics` does not have, and terms of the loss
    without weight.

    The busiest expert is that of all layers, beside a fair share.
    """
    parts = [f"step {step}/{run.schedule.total_steps}"]
    if "loss/total" in metrics:
        terms = [
            name
            for name in TERMS
            if f"loss/{name}" in metrics and metrics.get(f"loss/weighted/{name}") != 0
        ]
        inside = ", ".join(f"{name} {metrics[f'loss/{name}']:.3f}" for name in terms)
        parts.append(f"loss {metrics['loss/total']:.4f}" + (f" ({inside})" if inside else ""))
    loads = [load for name, load in metrics.items() if _LOAD.fullmatch(name)]
    if loads:
        parts.append(f"busiest expert x{max(loads):.2f}")
    if "optim/lr" in metrics:
        parts.append(f"lr {metrics['optim/lr']:.2e}")
    if "perf/samples_per_second" in metrics:
        parts.append(f"{metrics['perf/samples_per_second']:,.0f} samples/s")
    if "perf/tokens_per_second" in metrics:
        parts.append(f"{metrics['perf/tokens_per_second']:,.0f} tokens/s")
    filtered = sum(share for name, share in metrics.items() if name.startswith("data/filtered/"))
    if filtered:
        parts.append(f"filtered {filtered:.0%}")
    seconds = metrics.get("perf/seconds_per_step", 0.0)
    if seconds > 0:
        if "data/wait_seconds" in metrics:
            parts.append(f"data wait {min(1.0, metrics['data/wait_seconds'] / seconds):.0%}")
        parts.append(f"{clock_text((run.schedule.total_steps - step) * seconds)} left")
    return "  ".join(parts)


def _caption_table(written: Sequence[str], true: Sequence[str]) -> str:
    """Written and true captions as a Markdown table."""
    rows = [f"| {_cell(one)} | {_cell(other)} |" for one, other in zip(written, true, strict=True)]
    return "\n".join(["| written | true |", "|---|---|", *rows])


def _cell(text: str) -> str:
    """Text that cannot break out of its table cell."""
    escaped = (
        text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "&#124;").replace("`", "&#96;")
    )
    return escaped.replace("\n", " ")
