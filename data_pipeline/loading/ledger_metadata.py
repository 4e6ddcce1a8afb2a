"""Metadata of a ledger: the inputs from which the order of a run can be computed again."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from data_pipeline.common import storage
from data_pipeline.common.addresses import has_query, without_secrets
from data_pipeline.common.config import from_mapping, to_mapping
from data_pipeline.common.errors import ConfigError, DataError
from data_pipeline.common.json_file import write_json
from data_pipeline.loading.sources import Source
from data_pipeline.order.state import LoaderState, Ranges
from data_pipeline.settings import SourceConfig

METADATA_FILE = "ledger.json"
LEDGER_VERSION = 2


@dataclass(frozen=True, kw_only=True)
class LedgerPhase:
    """The data of one phase of training (`data.phase`)."""

    begin: int
    """Position of its first sample."""
    data: str
    """`data_fingerprint` of the sources."""
    shuffle_window: int = 0
    manifests: tuple[str, ...] = ()
    """Address of each source's manifest, without user, password and query."""
    sources: tuple[SourceConfig, ...] = ()
    """Empty if the phase ended before the ledger was enabled."""

    @staticmethod
    def of(sources: Sequence[Source], shuffle_window: int, *, begin: int, data: str) -> LedgerPhase:
        """A phase with these sources."""
        manifests = [_absolute(source.address or source.config.shards) for source in sources]
        configs = [
            replace(source.config.without_secrets(), drop=_absolute(source.config.drop))
            for source in sources
        ]
        return LedgerPhase(
            begin=begin,
            data=data,
            shuffle_window=shuffle_window,
            manifests=tuple(manifests),
            sources=tuple(configs),
        )


@dataclass(frozen=True, kw_only=True)
class LedgerMetadata:
    """The inputs of the order of a run."""

    seed: int
    phases: tuple[LedgerPhase, ...]
    skip: Ranges = ()
    """Positions that are never delivered."""

    @staticmethod
    def of(sources: Sequence[Source], shuffle_window: int, state: LoaderState) -> LedgerMetadata:
        """The metadata of a run that starts at or resumes from `state`; the sources of earlier
        phases are not known."""
        phases, begin = list[LedgerPhase](), 0
        for ended in state.ended_phases:
            phases.append(LedgerPhase(begin=begin, data=ended.data))
            begin = ended.end
        phases.append(LedgerPhase.of(sources, shuffle_window, begin=begin, data=state.data))
        return LedgerMetadata(seed=state.seed, skip=state.skip, phases=tuple(phases))

    def with_addresses(self, given: Sequence[SourceConfig]) -> LedgerMetadata:
        """A copy with the addresses of the settings, which may have queries (e.g. signatures); the
        ledger stores none.

        Sources whose manifest is in the run folder keep that manifest.

        Args:
            given: The sources of the last phase; earlier phases use the addresses that they share.

        Raises:
            ConfigError: The settings have other sources than the last phase.
        """
        given_addresses = [source.without_secrets().shards for source in given]
        sources = self.phases[-1].sources
        if given_addresses != [source.shards for source in sources]:
            raise ConfigError(
                f"the settings have other sources than the ledger: {_join_addresses(given)} "
                f"instead of {_join_addresses(sources)}"
            )
        new = dict(zip(given_addresses, given, strict=True))
        return replace(self, phases=tuple(_with_addresses(phase, new) for phase in self.phases))

    def write(self, folder: Path) -> None:
        """Write to the folder of a ledger; earlier phases that it has keep their sources.

        Raises:
            DataError: The metadata that it has is invalid.
        """
        known = LedgerMetadata.read(folder).phases if (folder / METADATA_FILE).exists() else ()
        phases = []
        for number, phase in enumerate(self.phases):
            if not phase.sources and number < len(known) and known[number].data == phase.data:
                phase = known[number]
            values = [to_mapping(source) for source in phase.sources]
            phases.append(asdict(phase) | {"sources": values})
        content = {"version": LEDGER_VERSION, "seed": self.seed, "skip": self.skip}
        write_json(folder / METADATA_FILE, content | {"phases": phases}, indent=1)

    @staticmethod
    def read(folder: Path) -> LedgerMetadata:
        """Read from the folder of a ledger; in version 1 there was one phase.

        Raises:
            DataError: The file is missing or invalid.
        """
        path = folder / METADATA_FILE
        data = storage.read_bytes(str(path))
        try:
            content = dict(json.loads(data))
            version = content.pop("version", None)
            if version == 1:
                seed, skip = content.pop("seed"), content.pop("skip", ())
                content = {"seed": seed, "skip": skip, "phases": [{"begin": 0} | content]}
            elif version != LEDGER_VERSION:
                raise ValueError(f"expected version 1 or {LEDGER_VERSION}")
            return from_mapping(LedgerMetadata, content)
        except (KeyError, ValueError, TypeError, ConfigError) as error:
            raise DataError(f"{path} is not valid ledger metadata: {error}") from error


def _with_addresses(phase: LedgerPhase, given: Mapping[str, SourceConfig]) -> LedgerPhase:
    """A copy of the phase with the sources' new addresses, by their old ones."""
    manifests, sources = [], []
    for url, old in zip(phase.manifests, phase.sources, strict=True):
        new = given.get(old.shards, old)
        manifests.append(new.shards if url == _absolute(old.shards) else url)
        drop = new.drop if has_query(new.drop) else old.drop
        sources.append(replace(old, shards=new.shards, drop=drop))
    return replace(phase, manifests=tuple(manifests), sources=tuple(sources))


def _join_addresses(sources: Sequence[SourceConfig]) -> str:
    return ", ".join(without_secrets(source.shards) for source in sources) or "none"


def _absolute(address: str) -> str:
    """An address that is valid from any working directory and contains no secrets."""
    if address and storage.is_local(address):
        return str(storage.local_path(address).absolute())
    return without_secrets(address)
