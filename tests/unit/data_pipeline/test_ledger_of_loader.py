"""The ledger of a real loader: interrupted runs with corrupt and filtered samples."""

from __future__ import annotations

import argparse
import itertools
from contextlib import closing
from pathlib import Path

from data_pipeline.commands import ledger as command
from data_pipeline.content.tokenizer import Tokenizer
from data_pipeline.loading.batch_samplers import shard_starts
from data_pipeline.loading.batch_spec import BatchSpec, RankInfo
from data_pipeline.loading.ledger import Ledger
from data_pipeline.loading.ledger_check import PhaseOrder, check_ledger
from data_pipeline.loading.ledger_metadata import LedgerMetadata
from data_pipeline.loading.loader import Loader
from data_pipeline.order.state import LoaderState
from data_pipeline.settings import DataConfig, FilterConfig
from data_pipeline.shards.manifest import Manifest
from tests.support.small_shards import make_caption, make_data_config, make_shards, make_tokenizer


def corrupt_shards(folder: Path) -> Manifest:
    """19 samples, of which sample 7 is corrupt."""
    manifest = make_shards(folder, count=19)
    path = folder / manifest.shards[1].name
    data = bytearray(path.read_bytes())
    data[600] ^= 1  # in the image of sample 7
    path.write_bytes(data)
    return manifest


def test_ledger_of_a_loader(tmp_path: Path) -> None:
    """Real batches with corrupt and filtered samples, interrupted and resumed on other ranks."""
    second = make_shards(tmp_path / "second", count=9, samples_per_shard=4)
    sources = [corrupt_shards(tmp_path / "corrupt"), second]
    longest = max(len(make_caption(i)) for i in range(19))
    filtered = [i for i in range(19) if len(make_caption(i)) == longest and i != 7]
    data = make_data_config(filters=FilterConfig(max_caption_chars=longest - 1))

    run = _LoaderRun(sources, data, Tokenizer.load(make_tokenizer(tmp_path)), tmp_path / "ledger")
    for world_size, steps, kept in ((1, 4, 3), (2, 5, 5), (4, 2, 1), (1, 3, 3)):
        run.train(world_size, steps, kept)
    assert command.handle(argparse.Namespace(folder=tmp_path, data="")) == 0

    order, starts = run.loader.order, shard_starts(sources)
    report = check_ledger(run.folder, [PhaseOrder(1, order, starts)])
    assert (report.steps, report.samples, report.world_sizes) == (12, 96, [1, 2, 4, 1])
    ids = [int(starts[ref.shard]) + ref.sample for ref in order.samples(0, 96)]
    assert report.corrupt == ids.count(7) > 0
    assert report.filtered == sum(ids.count(i) for i in filtered) > 0


class _LoaderRun:
    """Trains with real loaders and records their batches."""

    def __init__(
        self, sources: list[Manifest], data: DataConfig, tokenizer: Tokenizer, folder: Path
    ) -> None:
        self.sources, self.data, self.tokenizer, self.folder = sources, data, tokenizer, folder
        self.state, self.steps_done = LoaderState(), 0

    def train(self, world_size: int, steps: int, kept: int) -> None:
        """Train some steps, and keep the checkpoint after the first `kept` of them."""
        start = self.state
        for rank in range(world_size):
            self.loader = self._open_loader(start, RankInfo(rank=rank, world_size=world_size))
            ledger = Ledger.open(
                self.folder,
                rank=rank,
                world_size=world_size,
                micro_batch_size=2,
                resumed_step=self.steps_done,
                metadata=LedgerMetadata.of(
                    self.loader.sources, self.data.shuffle_window, self.loader.state
                ),
            )
            with closing(self.loader), closing(ledger):
                before = self.loader.state
                records = itertools.islice(self.loader.steps(), steps)
                for step, (batches, after) in enumerate(records, start=1):
                    ledger.add(self.steps_done + step, before.position, after.position, batches)
                    before = after
                    if step == kept:
                        self.state = after
        self.steps_done += kept

    def _open_loader(self, state: LoaderState, ranks: RankInfo) -> Loader:
        return Loader(
            sources=self.sources,
            tokenizer=self.tokenizer,
            data=self.data,
            batch=BatchSpec(image_size=8, context_length=16, micro_batch_size=2),
            global_batch_size=8,
            seed=2,
            ranks=ranks,
            state=state,
        )
