"""Metadata of a ledger: the inputs from which the order of a run can be computed again."""

from __future__ import annotations

import json
from collections.abc import Sequence
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
LEDGER_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class LedgerMetadata:
    """The inputs of the order of a run."""

    seed: int
    shuffle_window: int
    data: str
    """`data_fingerprint` of the sources."""
    manifests: tuple[str, ...]
    """Address of each source's manifest, without user, password and query."""
    sources: tuple[SourceConfig, ...]
    skip: Ranges = ()
    """Positions that are never delivered."""

    @staticmethod
    def of(sources: Sequence[Source], shuffle_window: int, state: LoaderState) -> LedgerMetadata:
        """The metadata of a run that starts at or resumes from `state`."""
        manifests = [_absolute(source.address or source.config.shards) for source in sources]
        configs = [
            replace(source.config.without_secrets(), drop=_absolute(source.config.drop))
            for source in sources
        ]
        return LedgerMetadata(
            seed=state.seed,
            shuffle_window=shuffle_window,
            data=state.data,
            skip=state.skip,
            manifests=tuple(manifests),
            sources=tuple(configs),
        )

    def with_addresses(self, given: Sequence[SourceConfig]) -> LedgerMetadata:
        """A copy with the addresses of the settings, which may have queries (e.g. signatures); the
        ledger stores none.

        Sources whose manifest is in the run folder keep that manifest.

        Raises:
            ConfigError: The settings have other sources.
        """
        given_addresses = [source.without_secrets().shards for source in given]
        if given_addresses != [source.shards for source in self.sources]:
            raise ConfigError(
                f"the settings have other sources than the ledger: {_join_addresses(given)} "
                f"instead of {_join_addresses(self.sources)}"
            )

        manifests, sources = [], []
        for url, old, new in zip(self.manifests, self.sources, given, strict=True):
            manifests.append(new.shards if url == _absolute(old.shards) else url)
            drop = new.drop if has_query(new.drop) else old.drop
            sources.append(replace(old, shards=new.shards, drop=drop))
        return replace(self, manifests=tuple(manifests), sources=tuple(sources))

    def write(self, folder: Path) -> None:
        """Write to the folder of a ledger."""
        content = asdict(self) | {"sources": [to_mapping(source) for source in self.sources]}
        write_json(folder / METADATA_FILE, {"version": LEDGER_VERSION} | content, indent=1)

    @staticmethod
    def read(folder: Path) -> LedgerMetadata:
        """Read from the folder of a ledger.

        Raises:
            DataError: The file is missing or invalid.
        """
        path = folder / METADATA_FILE
        data = storage.read_bytes(str(path))
        try:
            content = dict(json.loads(data))
            if content.pop("version", None) != LEDGER_VERSION:
                raise ValueError(f"expected version {LEDGER_VERSION}")
            return from_mapping(LedgerMetadata, content)
        except (ValueError, TypeError, ConfigError) as error:
            raise DataError(f"{path} is not valid ledger metadata: {error}") from error


def _join_addresses(sources: Sequence[SourceConfig]) -> str:
    return ", ".join(without_secrets(source.shards) for source in sources) or "none"


def _absolute(address: str) -> str:
    """An address that is valid from any working directory and contains no secrets."""
    if address and storage.is_local(address):
        return str(storage.local_path(address).absolute())
    return without_secrets(address)
