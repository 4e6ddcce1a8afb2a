"""What the order of a run was made of, beside its ledger: enough to make it again from the
manifests."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from data_pipeline.common import storage
from data_pipeline.common.addresses import has_query, without_secrets
from data_pipeline.common.config import from_mapping, to_mapping
from data_pipeline.common.errors import ConfigError, DataError
from data_pipeline.loading.sources import Source
from data_pipeline.order.state import LoaderState, Ranges
from data_pipeline.settings import SourceConfig

FACTS_FILE = "ledger.json"
LEDGER_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class LedgerFacts:
    """What the order of a run is made of."""

    seed: int
    shuffle_window: int
    data: str
    """`data_fingerprint` of the sources."""
    manifests: tuple[str, ...]
    """Where each source's manifest was, without user, password and query."""
    sources: tuple[SourceConfig, ...]
    skip: Ranges = ()
    """Positions that are never delivered."""

    @staticmethod
    def of(sources: Sequence[Source], shuffle_window: int, state: LoaderState) -> LedgerFacts:
        """Of a run that goes on from `state`."""
        return LedgerFacts(
            seed=state.seed,
            shuffle_window=shuffle_window,
            data=state.data,
            skip=state.skip,
            manifests=tuple(
                _absolute(source.address or source.config.shards) for source in sources
            ),
            sources=tuple(
                replace(source.config.without_secrets(), drop=_absolute(source.config.drop))
                for source in sources
            ),
        )

    def with_addresses(self, given: Sequence[SourceConfig]) -> LedgerFacts:
        """The same facts with the sources' addresses as settings have them: the ledger's own lack
        queries.

        Sources that were counted keep the manifest in the run's folder.

        Raises:
            ConfigError: The settings have other sources.
        """
        if [source.without_secrets().shards for source in given] != [
            source.shards for source in self.sources
        ]:
            raise ConfigError(
                f"these settings have other sources than the ledger: {_named(given)} instead of {_named(self.sources)}"
            )
        pairs = list(zip(self.sources, given, strict=True))
        at = [
            new.shards if url == _absolute(old.shards) else url
            for url, (old, new) in zip(self.manifests, pairs, strict=True)
        ]
        return replace(
            self,
            manifests=tuple(at),
            sources=tuple(
                replace(old, shards=new.shards, drop=new.drop if has_query(new.drop) else old.drop)
                for old, new in pairs
            ),
        )

    def write(self, folder: Path) -> None:
        """Into a ledger's folder."""
        content = asdict(self) | {"sources": [to_mapping(source) for source in self.sources]}
        data = json.dumps(
            {"version": LEDGER_VERSION} | content, indent=1, ensure_ascii=False
        ).encode()
        storage.write_bytes(str(folder / FACTS_FILE), data + b"\n")

    @staticmethod
    def read(folder: Path) -> LedgerFacts:
        """From a ledger's folder.

        Raises:
            DataError: There is none, or it is damaged.
        """
        path = folder / FACTS_FILE
        data = storage.read_bytes(str(path))
        try:
            found = dict(json.loads(data))
            if found.pop("version", None) != LEDGER_VERSION:
                raise ValueError(f"expected version {LEDGER_VERSION}")
            return from_mapping(LedgerFacts, found)
        except (ValueError, TypeError, ConfigError) as error:
            raise DataError(f"{path} does not describe a ledger: {error}") from error


def _named(sources: Sequence[SourceConfig]) -> str:
    return ", ".join(without_secrets(source.shards) for source in sources) or "none"


def _absolute(address: str) -> str:
    """An address that means the same from any folder, and may be written down."""
    if address and storage.is_local(address):
        return str(storage.local_path(address).absolute())
    return without_secrets(address)
