"""Opens the sources of a mixture (manifests, drop-lists, weights) and computes their order.

    sources = open_sources(data.sources)             # reads manifests and drop-lists
    order = make_order(sources, seed, data.shuffle_window)

The sources, the shuffle window and the seed determine the order of training; `data_fingerprint` is
a hash of the first two.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from data_pipeline.common import storage
from data_pipeline.common.addresses import without_secrets
from data_pipeline.common.distinct_names import lengthen_equal_names
from data_pipeline.common.problems import check_sections
from data_pipeline.order.drop_list import (
    Dropped,
    apply_drop_list,
    dropped_fingerprint,
    read_drop_list,
)
from data_pipeline.order.order import Order, OrderSource, weights_of
from data_pipeline.order.source_fractions import SourceFractions
from data_pipeline.settings import SourceConfig
from data_pipeline.shards.manifest import MANIFEST_NAME, Manifest, load_manifest


@dataclass(frozen=True, kw_only=True)
class Source:
    """One dataset of a mixture."""

    manifest: Manifest
    config: SourceConfig
    """Its settings: weight, repeats, name."""
    dropped: Dropped = field(default_factory=dict)
    """Shard index -> indices of samples that are never read."""
    address: str = ""
    """Where the manifest was read, if not at `config.shards`."""
    distinct_name: str = ""
    """A name that no other source of the mixture has; empty if it is alone."""

    @property
    def name(self) -> str:
        """Name for tables: the configured one, or the last components of the address."""
        return self.distinct_name or _name_components(self.config)[-1]

    @property
    def samples(self) -> int:
        """Number of samples that are not dropped."""
        return self.manifest.total_samples - sum(len(ids) for ids in self.dropped.values())


def unweighted_source(manifest: Manifest) -> Source:
    """A manifest as a source without a weight."""
    return Source(manifest=manifest, config=SourceConfig(shards=without_secrets(manifest.url)))


def as_source(source: Source | Manifest) -> Source:
    """A source; a manifest becomes a source without a weight."""
    return source if isinstance(source, Source) else unweighted_source(source)


def open_sources(
    configs: Iterable[SourceConfig],
    *,
    timeout_seconds: float = 60.0,
    manifest_urls: Mapping[str, str] | None = None,
) -> tuple[Source, ...]:
    """Read the manifests and drop-lists of a mixture.

    Args:
        configs: The sources.
        timeout_seconds: Maximum time for one request to a store.
        manifest_urls: `SourceConfig.shards` -> where its manifest is, if it is elsewhere.

    Raises:
        ConfigError: The settings of a source are invalid.
        DataError: A manifest or drop-list is missing or corrupt, or they do not match.
    """
    configs = tuple(configs)
    check_sections(*configs)
    sources = []
    for config, name in zip(configs, distinct_names(configs), strict=True):
        address = (manifest_urls or {}).get(config.shards, config.shards)
        manifest = load_manifest(address, timeout_seconds=timeout_seconds)

        dropped: Dropped = {}
        if config.drop:
            drop = read_drop_list(config.drop, timeout_seconds=timeout_seconds)
            dropped = apply_drop_list(drop, manifest, storage.redact(config.drop))
        sources.append(
            Source(
                manifest=manifest,
                config=config,
                dropped=dropped,
                address=address,
                distinct_name=name,
            )
        )
    return tuple(sources)


def distinct_names(configs: Sequence[SourceConfig]) -> list[str]:
    """The names of sources; equal ones get parent folders (`a/train`), or else a number."""
    components = [_name_components(config) for config in configs]
    names = lengthen_equal_names(components, "/".join)
    result: list[str] = []
    for name in names:
        number, unique = 1, name
        while unique in result or (number > 1 and unique in names):
            number += 1
            unique = f"{name}-{number}"
        result.append(unique)
    return result


def _name_components(config: SourceConfig) -> list[str]:
    """The configured name, or the components of the address, at least one."""
    if config.name:
        return [config.name]
    address = storage.redact(config.shards).rstrip("/").removesuffix(f"/{MANIFEST_NAME}")
    path = address.rpartition("://")[2]
    return [part for part in path.split("/") if part] or [address or "/"]


def make_order(sources: Sequence[Source], seed: int, shuffle_window: int, begin: int = 0) -> Order:
    """The order of training, or of the phase that begins at position `begin`.

    Raises:
        ConfigError: A source with a weight above 0 has no samples, or all weights are 0.
    """
    return Order([_order_source(source) for source in sources], seed, shuffle_window, begin)


def data_fingerprint(sources: Sequence[Source | Manifest], shuffle_window: int) -> str:
    """Hash of everything but the seed that determines the order; folders may be moved.

    Args:
        sources: The mixture; a manifest is a source without a weight.
        shuffle_window: Number of shards whose samples are shuffled together.
    """
    given = [as_source(source) for source in sources]
    shards = [
        [[shard.name, shard.samples, shard.sha256] for shard in source.manifest.shards]
        for source in given
    ]

    if len(given) == 1 and not given[0].dropped:
        # Neither a weight nor repeats change the order of a single source.
        content: list[object] = [shuffle_window, shards[0]]
    else:
        # Normalized weights: 1 to 1 and 2 to 2 give the same order.
        fractions = SourceFractions([weights_of(_order_source(source)) for source in given])
        content = [
            shuffle_window,
            fractions.to_json(),
            [dropped_fingerprint(source.dropped) for source in given],
            shards,
        ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]


def _order_source(source: Source) -> OrderSource:
    config = source.config
    weights = config.weight_schedule
    if not weights and config.weight is not None:
        weights = ((0, config.weight),)

    return OrderSource(
        name=source.name,
        sizes=[shard.samples for shard in source.manifest.shards],
        dropped=source.dropped,
        weights=weights,
        repeats=config.repeats,
    )
