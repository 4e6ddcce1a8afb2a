"""From the settings of a mixture to its order: manifests, drop-lists, weights.

    sources = open_sources(data.sources)             # reads manifests and drop-lists
    order = make_order(sources, seed, data.shuffle_window)

All that decides the order of training is in a `Source` and the window; `data_fingerprint` names it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from data_pipeline.common import storage
from data_pipeline.common.addresses import without_secrets
from data_pipeline.order.drop import Dropped, apply_drop_list, dropped_fingerprint, read_drop_list
from data_pipeline.order.order import Order, OrderSource, weights_of
from data_pipeline.order.shares import Shares
from data_pipeline.settings import SourceConfig
from data_pipeline.shards.manifest import MANIFEST_NAME, Manifest, load_manifest


@dataclass(frozen=True, kw_only=True)
class Source:
    """One dataset of a mixture, as it was found."""

    manifest: Manifest
    config: SourceConfig
    """Its settings: weight, repeats, name."""
    dropped: Dropped = field(default_factory=dict)
    """Numbers of samples that are never read, by shard."""
    address: str = ""
    """Where the manifest was read, if not at `config.shards`."""

    @property
    def name(self) -> str:
        """How tables call it: its own name, or the last part of its address."""
        if self.config.name:
            return self.config.name
        address = storage.redact(self.config.shards).rstrip("/").removesuffix(f"/{MANIFEST_NAME}")
        return address.rpartition("/")[2] or address

    @property
    def samples(self) -> int:
        """Samples that are left after its drop-list."""
        return self.manifest.total_samples - sum(len(gone) for gone in self.dropped.values())


def plain_source(manifest: Manifest) -> Source:
    """A manifest as a source of its own, without a weight."""
    return Source(manifest=manifest, config=SourceConfig(shards=without_secrets(manifest.url)))


def open_sources(
    configs: Iterable[SourceConfig],
    *,
    timeout_seconds: float = 60.0,
    at: Mapping[str, str] | None = None,
) -> tuple[Source, ...]:
    """Read the manifests and drop-lists of a mixture.

    Args:
        configs: Its sources.
        timeout_seconds: Longest wait for one request to a store.
        at: Where the manifests of some addresses lie, if elsewhere.

    Raises:
        DataError: A manifest or drop-list is missing, damaged, or they do not belong together.
    """
    found = []
    for config in configs:
        address = (at or {}).get(config.shards, config.shards)
        manifest = load_manifest(address, timeout_seconds=timeout_seconds)
        dropped: Dropped = {}
        if config.drop:
            drop = read_drop_list(config.drop, timeout_seconds=timeout_seconds)
            dropped = apply_drop_list(drop, manifest, storage.redact(config.drop))
        found.append(Source(manifest=manifest, config=config, dropped=dropped, address=address))
    return tuple(found)


def make_order(sources: Sequence[Source], seed: int, shuffle_window: int) -> Order:
    """The order of training.

    Raises:
        ConfigError: A source that is drawn from has no samples, or all weights are 0.
    """
    return Order([_order_source(source) for source in sources], seed, shuffle_window)


def data_fingerprint(sources: Sequence[Source | Manifest], shuffle_window: int) -> str:
    """A name for everything but the seed that decides the order; folders may move.

    Args:
        sources: The mixture; a manifest alone is a source without a weight.
        shuffle_window: Shards whose samples are shuffled together.
    """
    given = [source if isinstance(source, Source) else plain_source(source) for source in sources]
    shards = [
        [[shard.name, shard.samples, shard.sha256] for shard in source.manifest.shards]
        for source in given
    ]
    if len(given) == 1 and not given[0].dropped:
        # Nothing but the shards and the window counts: neither a weight nor repeats change a source
        # alone.
        facts: list[object] = [shuffle_window, shards[0]]
    else:
        # Shares, not weights: 1 to 1 and 2 to 2 are the same order.
        mixed = Shares([weights_of(_order_source(source)) for source in given]).described()
        facts = [
            shuffle_window,
            mixed,
            [dropped_fingerprint(source.dropped) for source in given],
            shards,
        ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


def _order_source(source: Source) -> OrderSource:
    config = source.config
    return OrderSource(
        name=source.name,
        sizes=[shard.samples for shard in source.manifest.shards],
        dropped=source.dropped,
        weights=config.weight_schedule or (() if config.weight is None else ((0, config.weight),)),
        repeats=config.repeats,
    )
