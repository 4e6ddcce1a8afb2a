"""The objects that a training run consists of, on one rank."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, TypeVar

from data_pipeline.content.tokenizer import Tokenizer
from data_pipeline.loading.batch_spec import BatchSpec, RankInfo
from data_pipeline.loading.ledger import Ledger
from data_pipeline.loading.ledger_metadata import LedgerMetadata
from data_pipeline.loading.loader import Loader
from data_pipeline.loading.sources import Source
from data_pipeline.order.state import LoaderState
from data_pipeline.settings import DataConfig
from pretrain.config.batch import BatchPlan
from pretrain.config.schema import RunConfig
from pretrain.parallel.communicator import Communicator
from pretrain.parallel.engine import Engine
from pretrain.parallel.environment import RankEnvironment
from pretrain.train.run_folder import (
    CHECKPOINTS_FOLDER,
    LEDGER_FOLDER,
    run_on_rank_zero,
    write_run_files,
)

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class TrainComponents:
    """Everything that `pretrain.train.build.build` creates for the training loop."""

    run: RunConfig
    out: Path
    """The run folder."""
    start_time: float
    """`time.perf_counter()` at the start of building."""
    environment: RankEnvironment
    batch_plan: BatchPlan
    engine: Engine
    tokenizer: Tokenizer
    sources: tuple[Source, ...]
    lock: BinaryIO | None = None
    """Of the run folder, on rank 0; held until the file is closed."""

    @property
    def communicator(self) -> Communicator:
        """Collectives of this rank."""
        return self.engine.communicator

    @property
    def data(self) -> DataConfig:
        """Data settings; by default remote shards are cached in the run folder."""
        return replace(self.run.data, cache_dir=self.run.data.cache_dir or str(self.out / "cache"))

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.out / CHECKPOINTS_FOLDER

    def open_loader(self, state: LoaderState) -> Loader:
        """The training data, starting at `state`."""
        return Loader(
            sources=self.sources,
            tokenizer=self.tokenizer,
            data=self.data,
            batch=BatchSpec(
                image_size=self.run.model.image_size,
                context_length=self.run.model.context_length,
                micro_batch_size=self.run.batch.micro_batch_size,
            ),
            seed=self.run.seed,
            ranks=RankInfo(rank=self.environment.rank, world_size=self.environment.world_size),
            global_batch_size=self.run.batch.global_batch_size,
            state=state,
        )

    def open_ledger(self, loader: Loader, step: int) -> Ledger | None:
        """This rank's ledger of delivered samples, starting at `step`; None unless enabled.
        Collective."""
        if not self.run.data.ledger:
            return None
        metadata = LedgerMetadata.of(self.sources, self.run.data.shuffle_window, loader.state)
        self.on_rank_zero(lambda: metadata.write(self.out / LEDGER_FOLDER))
        return Ledger.open(
            self.out / LEDGER_FOLDER,
            rank=self.environment.rank,
            world_size=self.environment.world_size,
            micro_batch_size=self.run.batch.micro_batch_size,
            resumed_step=step,
        )

    def on_rank_zero(self, work: Callable[[], T]) -> T | None:
        """See `run_on_rank_zero`. Collective."""
        return run_on_rank_zero(self.communicator, self.out, work)

    def save_resolved_config(self) -> None:
        """Write the resolved settings and the tokenizer into the run folder. Collective.

        Called once training is certain to start: a start that fails must not overwrite settings
        that match the existing checkpoints.
        """
        self.on_rank_zero(
            lambda: write_run_files(self.run, self.out, self.tokenizer, self.batch_plan)
        )
