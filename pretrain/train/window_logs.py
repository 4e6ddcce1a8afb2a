"""Logs the steps since the last log entry: metrics of all ranks, corrupt and skipped samples."""

from __future__ import annotations

from data_pipeline.loading.loader import Loader
from pretrain.train.components import TrainComponents
from pretrain.train.corrupt_samples import CorruptSampleGuard
from pretrain.train.metrics import RankReport, SourceSize, Window
from pretrain.train.reporter import Reporter
from pretrain.train.skipped_samples import SkippedSampleMonitor
from pretrain.train.state import TrainState


class WindowLogs:
    """Metrics and corrupt samples of the steps since the last log entry."""

    def __init__(
        self,
        components: TrainComponents,
        loader: Loader,
        reporter: Reporter | None,
        *,
        first_sample: int,
    ) -> None:
        run, communicator = components.run, components.communicator
        sources = [
            SourceSize(source.name, source.manifest.total_samples) for source in loader.sources
        ]
        self.window = Window(run, communicator.world_size, communicator.device, sources)
        self._skipped = SkippedSampleMonitor(sources, run)
        self._guard = CorruptSampleGuard(run.data.max_corrupt_ratio, samples_read=first_sample)
        self._communicator, self._loader, self._reporter = communicator, loader, reporter

    def write(self, state: TrainState, rate: float) -> None:
        """Log the window and start a new one. Collective.

        Raises:
            DataError: Too many samples were corrupt; raised on every rank.
        """
        gathered = self._communicator.all_gather_json(self.window.rank_report().to_json())
        reports = [RankReport.from_json(report) for report in gathered]
        if self._reporter is not None:
            problems = [problem for report in reports for problem in report.problems]
            self._reporter.log_corrupt_samples(problems, state.step)
            entry = self.window.entry(
                state,
                reports,
                learning_rate=rate,
                consumed=self._loader.order.consumed(state.loader.position),
                corrupt=self._reporter.corrupt_counts,
            )
            self._reporter.log_step(entry)
            self._skipped.add(reports)
        self.window.reset()
        self._guard.add(reports, samples_read=state.loader.position)
