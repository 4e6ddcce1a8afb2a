"""Settings of the data pipeline.

A training configuration contains a `DataConfig` (in `pretrain`, the section `data:` of a run's
YAML); a program that only needs batches creates one directly. `vlmoe settings data` prints the
docstrings below.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from data_pipeline.common.addresses import userinfo_problems, without_secrets
from data_pipeline.common.problems import Problems
from data_pipeline.common.tables import counted
from data_pipeline.sample_keys import IMAGE_KEYS, image_keys_problem
from data_pipeline.sample_settings import AugmentConfig, FilterConfig, ImageMode, LimitConfig

__all__ = [
    "AugmentConfig",
    "DataConfig",
    "FilterConfig",
    "ImageMode",
    "LimitConfig",
    "SourceConfig",
    "caption_key_problems",
    "to_sources",
]


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One dataset of a mixture."""

    shards: str
    """Address of a manifest (`.../manifest.json`), of a folder that contains one, or of shards
    without a manifest: a folder, braces, wildcards, or a list file `@FILE`; local or in a store."""
    name: str = ""
    """Name in tables and in TensorBoard; empty uses the last component of the address, with parent
    folders if another source has the same one."""
    weight: float | None = None
    """Fraction of every global batch, relative to the weights of the other sources. If no source
    has a weight, all sources are concatenated: one epoch visits every sample `repeats` times."""
    weight_schedule: tuple[tuple[int, float], ...] = ()
    """A weight that changes during training, instead of `weight`: points `[pairs, weight]` with
    pairs counted from the start of training, or of the phase (`data.phase`); linear between points,
    constant before the first and after the last."""
    repeats: int = 1
    """How often each sample of this source is visited per epoch; only without weights."""
    drop: str = ""
    """Address of a drop-list (from `vlmoe data dedup`, `filter` or `check`): samples that are never
    read."""
    image_keys: tuple[str, ...] | None = None
    """Instead of `data.image_keys`, for this source; as for the following settings, null uses the
    setting of `data`."""
    image_mode: ImageMode | None = None
    """Instead of `data.image_mode`."""
    caption_keys: tuple[str, ...] | None = None
    """Instead of `data.caption_keys`."""
    caption_weights: tuple[float, ...] | None = None
    """Instead of `data.caption_weights`; null with `caption_keys` weights them equally."""
    filters: FilterConfig | None = None
    """Instead of `data.filters`, all of them: `{}` disables filters for this source."""
    augment: AugmentConfig | None = None
    """Instead of `data.augment`, all of it."""

    def problems(self) -> list[str]:
        """Invalid settings of this source."""
        source = f"data.train source {self.name or without_secrets(self.shards)!r}"
        found = Problems(self, source)
        found.messages += userinfo_problems(self.shards, "data.train")
        found.messages += userinfo_problems(self.drop, f"{source}: drop")
        found.require(
            bool(self.shards),
            "a source of data.train has an empty `shards`; set it to a manifest or a folder",
        )
        found.require(
            self.weight is None or self.weight >= 0, f"{source}: weight is {self.weight}, below 0"
        )
        found.require(
            self.weight is None or not self.weight_schedule,
            f"{source} has both weight and weight_schedule; set only one",
        )
        found.require(self.repeats >= 1, f"{source}: repeats is {self.repeats}, below 1")
        points = [pairs for pairs, _ in self.weight_schedule]
        found.require(
            points == sorted(set(points)) and min(points, default=0) >= 0,
            f"{source}: weight_schedule has points at {points} pairs; they must be increasing and "
            f"not negative",
        )
        found.require(
            all(weight >= 0 for _, weight in self.weight_schedule),
            f"{source}: weight_schedule has a weight below 0",
        )
        found.require(
            self.repeats == 1 or (self.weight is None and not self.weight_schedule),
            f"{source} has both repeats and a weight; with a weight, remove repeats",
        )
        return found.messages

    def without_secrets(self) -> SourceConfig:
        """A copy for writing to files: addresses without the query of presigned URLs."""
        return replace(self, shards=without_secrets(self.shards), drop=without_secrets(self.drop))


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which data is read, and how samples are made from it."""

    train: tuple[SourceConfig | str, ...] = ()
    """Sources of training data: addresses, or sections with `shards` and further settings (`vlmoe
    settings data.train` lists them)."""
    phase: int = 1
    """Number of the phase: increase it by 1 to continue a trained run on more or other data. The
    order of the new phase begins where the last checkpoint ended."""
    tokenizer: str = ""
    """Path of the SentencePiece model file."""
    image_keys: tuple[str, ...] = IMAGE_KEYS
    """Extensions of the image file: exactly one file of a sample must have one of them."""
    image_mode: ImageMode = "crop"
    """How an image becomes square: its center square (`crop`, as in CLIP: nothing is distorted, the
    edges are lost), the whole image on white (`pad`), the whole image with another aspect ratio
    (`squash`), or a square at a random position (`random_crop`; the center in evaluation). With
    `augment.crop_scale`, training images are random crops instead."""
    caption_keys: tuple[str, ...] = ("txt",)
    """Where captions are read from: `txt` is the .txt member, `json:NAME` a field of the .json
    member (a string, or a list of strings from which one is sampled)."""
    caption_weights: tuple[float, ...] = (1.0,)
    """Relative probability of each of `caption_keys`; one weight per key."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """Random augmentations of training images."""
    filters: FilterConfig = field(default_factory=FilterConfig)
    """Filters: samples that do not meet them are skipped."""
    limits: LimitConfig = field(default_factory=LimitConfig)
    """Maximum size of a sample; a larger one counts as corrupt."""
    shuffle_window: int = 256
    """Number of shards whose samples are shuffled together; the order of shards is always
    shuffled."""
    workers: int = 2
    """Number of loader processes per rank; 0 loads in the training process."""
    prefetch: int = 4
    """Number of micro-batches that each worker prepares ahead."""
    cache_dir: str = ""
    """Local folder for copies of remote shards, shared by the ranks of a node. If it is empty,
    training uses a subfolder of the run folder; a loader without a run needs it."""
    cache_gib: float = 500.0
    """Maximum size of the copies of shards on a node in GiB; the least recently used are deleted
    first. 0 disables caching: every sample is one range request."""
    fetch_ahead: int = 8
    """Number of shards that a node downloads ahead; 0 downloads none and reads samples with range
    requests."""
    max_corrupt_ratio: float = 0.01
    """Stop the run if more than this fraction of the samples (and at least 100) are corrupt."""
    max_filtered_ratio: float = 0.5
    """Warn before training if more than this fraction of some samples of a source is skipped; if
    the settings exclude all of them, the run does not start."""
    request_seconds: float = 20.0
    """Timeout of one request to a store (8 MiB at most) in seconds, before it is retried."""
    shard_seconds: float = 120.0
    """Time limit for a shard or sample from a store in seconds, including retries; after it, its
    samples count as corrupt."""
    timeout_seconds: float = 300.0
    """Maximum time to wait for a batch in seconds, before the run stops with an error."""
    ledger: bool = False
    """Record the samples of every step in `ledger/` of the run folder (8 bytes per sample)."""

    def problems(self) -> list[str]:
        """Invalid settings, without those of `train` entries, augmentation, filters and limits."""
        found = Problems(self, "data")
        found.at_least(0, "workers", "cache_gib", "fetch_ahead")
        found.at_least(1, "phase", "shuffle_window", "prefetch")
        found.above_zero("request_seconds", "shard_seconds", "timeout_seconds")
        found.within(0, 1, "max_corrupt_ratio", "max_filtered_ratio")
        found.require(
            self.shard_seconds < self.timeout_seconds,
            f"data.shard_seconds is {self.shard_seconds:g}, not below data.timeout_seconds "
            f"({self.timeout_seconds:g}): waiting for a batch would time out first",
        )
        messages = found.messages + self._key_problems() + self._source_problems()
        for source in self.sources:
            if any(getattr(source, name) is not None for name in _PER_SOURCE[:4]):
                own = self.for_source(source)._key_problems()
                messages += [f"source {source.name or source.shards}: {text}" for text in own]
        return list(dict.fromkeys(messages))

    def _key_problems(self) -> list[str]:
        found, weights = Problems(self, "data"), self.caption_weights
        found.messages += caption_key_problems(self.caption_keys, "data.caption_keys")
        found.require(
            len(self.caption_keys) == len(weights),
            f"data.caption_weights has {counted(len(weights), 'value')} for "
            f"{len(self.caption_keys)} data.caption_keys; set one weight per key",
        )
        problem = image_keys_problem(self.image_keys)
        found.require(not problem, f"data.image_keys: {problem}")
        found.require(
            all(weight >= 0 for weight in weights) and (not weights or sum(weights) > 0),
            f"data.caption_weights is {list(weights)}, but all must be at least 0 and one above 0",
        )
        return found.messages

    def _source_problems(self) -> list[str]:
        addresses = [entry for entry in self.train if isinstance(entry, str)]
        messages = [text for entry in addresses for text in SourceConfig(shards=entry).problems()]
        has_weight = [
            source.weight is not None or bool(source.weight_schedule) for source in self.sources
        ]
        if any(has_weight) and not all(has_weight):
            messages.append(
                "data.train: some sources have a weight and others do not; set it for all or none"
            )
        return messages

    def for_source(self, source: SourceConfig) -> DataConfig:
        """These settings with those that a source has instead."""
        own = {name: getattr(source, name) for name in _PER_SOURCE}
        if source.caption_keys is not None and source.caption_weights is None:
            own["caption_weights"] = (1.0,) * len(source.caption_keys)
        return replace(self, **{name: value for name, value in own.items() if value is not None})

    @property
    def sources(self) -> tuple[SourceConfig, ...]:
        """`train`, with every address as a `SourceConfig`."""
        return to_sources(self.train)

    def without_secrets(self) -> DataConfig:
        """A copy for writing to files: addresses without the query of presigned URLs."""
        train = tuple(
            without_secrets(entry) if isinstance(entry, str) else entry.without_secrets()
            for entry in self.train
        )
        return replace(self, train=train)


_PER_SOURCE = (
    "image_keys",
    "image_mode",
    "caption_keys",
    "caption_weights",
    "filters",
    "augment",
)


def caption_key_problems(keys: Sequence[str], setting: str) -> list[str]:
    """No caption keys, or some that are none; `setting` is the name in messages."""
    if not keys:
        return [f"{setting} is empty; give the location of the captions, such as txt"]
    return [
        f"{setting} contains {key!r}; use txt (or another text member: text, caption, en.txt), or "
        f"json:FIELD for a field of the .json member"
        for key in keys
        if not re.fullmatch(r"json:.+|([^:\s]+\.)?(txt|text|caption)", key)
    ]


def to_sources(entries: Sequence[SourceConfig | str]) -> tuple[SourceConfig, ...]:
    """Convert addresses to sources; sources are unchanged."""
    return tuple(
        SourceConfig(shards=entry) if isinstance(entry, str) else entry for entry in entries
    )
