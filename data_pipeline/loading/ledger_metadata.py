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
            given: The sources of the last phase, by position; in earlier phases an address has the
                query that one of theirs has.

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
        known = {
            without_secrets(address): address
            for source in given
            for address in (source.shards, source.drop)
            if has_query(address)
        }
        earlier = (
            _with_addresses(phase, [_with_queries(source, known) for source in phase.sources])
            for phase in self.phases[:-1]
        )
        last = _with_addresses(
            self.phases[-1],
            [
                _with_queries(old, {old.shards: new.shards, without_secrets(new.drop): new.drop})
                for old, new in zip(sources, given, strict=True)
            ],
        )
        return replace(self, phases=(*earlier, last))

    def write(self, folder: Path) -> None:
        """Write to the folder of a ledger; earlier phases that it has keep their sources.

        Raises:
            DataError: The metadata that it has is invalid.
        """
        known = LedgerMetadata.read(folder).phases if (folder / METADATA_FILE).exists() else ()
        phases = []
        for number, phase in enumerate(self.phases):
            if not phase.sources and number < len(known) and known[number].data == phase.data:
                phase = replace(known[number], begin=phase.begin)
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


def _with_queries(source: SourceConfig, known: Mapping[str, str]) -> SourceConfig:
    """A copy of the source with the addresses that `known` has for its own, without a query."""
    shards = known.get(source.shards, source.shards)
    drop = known.get(source.drop, source.drop) if source.drop else ""
    return replace(source, shards=shards, drop=drop if has_query(drop) else source.drop)


def _with_addresses(phase: LedgerPhase, sources: Sequence[SourceConfig]) -> LedgerPhase:
    """A copy of the phase with these sources instead of its own."""
    manifests = [
        new.shards if url == _absolute(old.shards) else url
        for url, old, new in zip(phase.manifests, phase.sources, sources, strict=True)
    ]
    return replace(phase, manifests=tuple(manifests), sources=tuple(sources))


def _join_addresses(sources: Sequence[SourceConfig]) -> str:
    return ", ".join(without_secrets(source.shards) for source in sources) or "none"


def _absolute(address: str) -> str:
    """An address that is valid from any working directory and contains no secrets."""
    if address and storage.is_local(address):
        return str(storage.local_path(address).absolute())
    return without_secrets(address)
