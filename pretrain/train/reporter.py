"""Logs of a run: console lines, TensorBoard, metrics.jsonl and corrupt_samples.jsonl.

Only rank 0 has a `Reporter`. When a run resumes from a checkpoint, entries of later steps are
removed, so that every step appears once. An I/O error never stops a run: it is logged once, and the
file is no longer written.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.tensorboard import SummaryWriter

from data_pipeline.common.escaping import escape_control
from data_pipeline.common.tables import markdown_table
from data_pipeline.samples import SampleProblem
from pretrain.config.schema import RunConfig
from pretrain.evaluate.routing.grids import coactivation_grids, load_grids
from pretrain.evaluate.routing.heatmap import draw_grids
from pretrain.train.caption_figure import draw_captions
from pretrain.train.jsonl import METRICS_FILE, JsonlWriter
from pretrain.train.log_entry import LogEntry
from pretrain.train.progress import progress_line

logger = logging.getLogger(__name__)

Array = np.ndarray[Any, Any]

CORRUPT_SAMPLES_FILE, TENSORBOARD_FOLDER = "corrupt_samples.jsonl", "tensorboard"


class Reporter:
    """Writes the logs of one run into its folder."""

    def __init__(self, run_dir: Path, run: RunConfig, resumed_step: int) -> None:
        """Open the files.

        Args:
            run_dir: The run folder; created if missing.
            run: The run.
            resumed_step: Step of the checkpoint; entries of later steps are removed.
        """
        run_dir.mkdir(parents=True, exist_ok=True)
        self._run = run
        self._blocks = run.moe.blocks(run.model.num_layers)
        self._last_step = resumed_step
        self._failed: set[str] = set()
        self._metrics = JsonlWriter(run_dir / METRICS_FILE, resumed_step=resumed_step)
        self._corrupt = JsonlWriter(run_dir / CORRUPT_SAMPLES_FILE, resumed_step=resumed_step)
        self.corrupt_counts = Counter(str(row.get("reason")) for row in self._corrupt.kept)
        """Number of corrupt samples so far, by reason."""
        _silence_tensorboard_thread()
        # TensorBoard ignores events of older files from `purge_step` on.
        self._events = SummaryWriter(
            str(run_dir / TENSORBOARD_FOLDER), purge_step=resumed_step + 1, flush_secs=10
        )

    def log_step(self, entry: LogEntry) -> None:
        """Write an entry to all files and to the console."""
        self._last_step = entry.step
        self._try(METRICS_FILE, lambda: self._metrics.write(entry.to_row()))
        self._try(TENSORBOARD_FOLDER, lambda: self._write_events(entry))
        logger.info("%s", progress_line(entry, self._run))

    def log_captions(
        self, step: int, images: Array, generated: Sequence[str], references: Sequence[str]
    ) -> None:
        """Log images with generated captions to TensorBoard.

        Args:
            step: Number of completed optimizer steps.
            images: uint8 `[images, 3, height, width]`.
            generated: The model's caption of each image.
            references: The reference caption of each image.
        """

        def write() -> None:
            figure = draw_captions(images, generated, references)
            self._events.add_image("captions", figure, step, dataformats="HWC")
            # Also as text, since the font of the figure only has Latin letters.
            self._events.add_text("captions", _caption_table(generated, references), step)
            self._events.flush()

        self._try(TENSORBOARD_FOLDER, write)

    def log_routing(self, step: int, load_LME: Array, coactivation_LEE: Array) -> None:
        """Log heatmaps of one step's routing to TensorBoard.

        These are `moe/load` and, with several experts per token, `moe/coactivation`.

        Args:
            step: Number of completed optimizer steps.
            load_LME: Assignments, `[MoE layers, modalities, experts]`.
            coactivation_LEE: Tokens assigned to both experts, `[MoE layers, experts, experts]`.
        """

        def write() -> None:
            grids = {"moe/load": load_grids(load_LME, self._blocks, self._run.moe)}
            if self._run.moe.top_k > 1 and coactivation_LEE.size:
                grids["moe/coactivation"] = coactivation_grids(
                    coactivation_LEE, self._blocks, self._run.moe
                )
            for name, layers in grids.items():
                figure = np.asarray(draw_grids(layers))
                self._events.add_image(name, figure, step, dataformats="HWC")
            self._events.flush()

        self._try(TENSORBOARD_FOLDER, write)

    def log_corrupt_samples(
        self, problems: Sequence[SampleProblem], step: int | None = None
    ) -> None:
        """Write corrupt samples to corrupt_samples.jsonl, and log their counts by reason.

        Args:
            problems: Corrupt samples since the last call.
            step: Step in which they were read; by default the one after the last logged step.
        """
        row_step = self._last_step + 1 if step is None else step

        def write() -> None:
            for problem in problems:
                self._corrupt.write({"step": row_step} | problem._asdict())

        self._try(CORRUPT_SAMPLES_FILE, write)
        self.corrupt_counts.update(problem.reason for problem in problems)
        if problems:
            counts = ", ".join(
                f"{reason} {count}" for reason, count in sorted(self.corrupt_counts.items())
            )
            logger.warning(
                "skipped %d corrupt sample%s (total: %s), listed in %s; the first: "
                "%s, sample %s: %s: %s",
                len(problems),
                "s" * (len(problems) > 1),
                escape_control(counts),
                CORRUPT_SAMPLES_FILE,
                *(escape_control(str(field)) for field in problems[0][:4]),
            )

    def close(self) -> None:
        """Close all files."""
        self._try(TENSORBOARD_FOLDER, self._events.close)
        self._try(METRICS_FILE, self._metrics.close)
        self._try(CORRUPT_SAMPLES_FILE, self._corrupt.close)

    def _write_events(self, entry: LogEntry) -> None:
        for name, value in entry.scalars().items():
            self._events.add_scalar(name, value, entry.step)
        for name, load in entry.expert_loads().items():
            self._write_histogram(name, np.array(load), entry.step)
        self._events.flush()

    def _write_histogram(self, name: str, load_E: Array, step: int) -> None:
        """A histogram with one bin per expert, `[e, e + 1)`, whose count is its tokens."""
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

    def _try(self, name: str, write: Callable[[], None]) -> None:
        """Call `write` unless an earlier write to the same file failed."""
        if name in self._failed:
            return
        try:
            write()
        except OSError as error:
            self._failed.add(name)
            reason = error.strerror or error
            logger.error("cannot write %s (%s); training continues without it", name, reason)


def _silence_tensorboard_thread() -> None:
    """Do not print errors of TensorBoard's writer thread; the next write raises them."""
    previous_hook = threading.excepthook

    def hook(args: threading.ExceptHookArgs) -> None:
        is_writer = type(args.thread).__name__ == "_AsyncWriterThread"
        if not (is_writer and isinstance(args.exc_value, OSError)):
            previous_hook(args)

    threading.excepthook = hook


def _caption_table(generated: Sequence[str], references: Sequence[str]) -> str:
    """Generated and reference captions as a Markdown table."""
    rows = [
        (_escape_html(caption), _escape_html(reference))
        for caption, reference in zip(generated, references, strict=True)
    ]
    return markdown_table(["generated", "reference"], rows, align="l")


def _escape_html(text: str) -> str:
    """Text in which nothing is HTML or Markdown."""
    return (
        text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "&#124;").replace("`", "&#96;")
    )
